"""loss.png: the losses of a run against the entropy of its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(metrics: Sequence[dict[str, Any]], unigram_entropy: float, title: str, path: Path) -> None:
    """LM loss and each MTP depth's over the steps, in nats a token, and the unigram entropy as a line."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="nats a token", title=title)
    steps = [line["step"] for line in metrics]
    axes.plot(steps, [line["lm_loss"] for line in metrics], label="LM loss", color="C0")
    depths = len(metrics[0]["mtp_losses"]) if metrics else 0
    for depth in range(depths):
        values = [line["mtp_losses"][depth] for line in metrics]
        axes.plot(steps, values, label=f"MTP loss, depth {depth + 1}", color=f"C{depth + 1}", alpha=0.6)
    axes.axhline(unigram_entropy, color="gray", linestyle="--", label=f"unigram entropy, {unigram_entropy:.2f}")
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
