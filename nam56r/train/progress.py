"""What a run shows while it trains: a bar on a terminal, a line every few steps elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows each step's metrics, as metrics.jsonl has them."""

    def __init__(self, console: Console, start: int, steps: int, every: int):
        self.console, self._steps, self._every = console, steps, every
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", completed=start, total=steps, line="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; can be called again."""
        self._bar.stop()

    def show(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        self._bar.update(self._task, completed=step, line=line(metrics))
        if not self.console.is_terminal and (step % self._every == 0 or step in (1, self._steps)):
            say(self.console, f"step {step}/{self._steps}  {line(metrics)}")


def say(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def line(metrics: dict[str, Any]) -> str:
    """One step in words."""
    parts = [f"loss {metrics['loss']:.4f}", f"LM {metrics['lm_loss']:.4f}"]
    if metrics["mtp_losses"]:
        parts.append("MTP " + " ".join(f"{loss:.4f}" for loss in metrics["mtp_losses"]))
    parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if metrics["mfu"] is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    parts.append(f"{metrics['memory_gib']:.1f} GiB")
    return "  ".join(parts)
