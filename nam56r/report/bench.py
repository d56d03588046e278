"""bench/results/<device>.json into one Markdown page with plots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# operator -> where NAM56R uses it
SLOTS = {
    "mla_attention": "A",
    "latent_attention": "A",
    "mla_queries": "A",
    "mla_latents": "A",
    "index_top_k": "A sparse",
    "sparse_latent_attention": "A sparse",
    "indexer_kl_loss": "A sparse",
    "moe_experts": "E",
    "mamba2_scan": "M",
    "mamba3_scan": "M",
    "mamba3_step": "M",
    "m2rnn": "R",
    "causal_conv1d": "R",
    "rms_norm": "all",
    "linear_cross_entropy": "head",
}

# operators that are one step after the other, so that a step's latency bounds them; the other scans work in chunks
RECURRENCES = ("m2rnn",)


class Record(BaseModel):
    """One measured case. Times are medians; ratio is peer_ms / ms, so above 1 is faster than the peer."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    op: str
    case: str
    kernel: str
    direction: str = Field(alias="pass")
    ms: float = Field(gt=0)
    tflops: float | None = None
    gbs: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None
    peer: str | None = None
    peer_ms: float | None = None
    ratio: float | None = None
    floor_ms: float | None = None
    commit: str
    torch: str
    triton: str | None = None
    device: str
    date: str


def us_per_step(op: str, case: str, ms: float) -> float | None:
    """Microseconds a recurrence's step takes; None for other operators and for cases without S<steps>.

    The steps that follow one another are S, or S / n where the case says packed<n>: n sequences of equal length.
    """
    words = dict(re.findall(r"\b(S|packed)(\d+)\b", case))
    if op not in RECURRENCES or "S" not in words:
        return None
    return ms * 1e3 * int(words.get("packed", 1)) / int(words["S"])


def read(results: str | Path) -> list[Record]:
    """The records of every .json file in a folder, slots and operators in a fixed order.

    Files named *-error.json hold no records and are left out. Raises ValueError, in one line, when there is none or a
    file is not a list of records.
    """
    files = sorted(path for path in Path(results).glob("*.json") if not path.stem.endswith("-error"))
    if not files:
        raise ValueError(
            f"no results in {results}: `pytest bench/` writes one <device>.json for each machine it ran on"
        )
    records = []
    for path in files:
        try:
            entries = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path} is not a list of records")
        for number, entry in enumerate(entries, 1):
            try:
                records.append(Record.model_validate(entry))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "record"
                raise ValueError(f"{path}, record {number}: {where}: {first['msg']}") from error
    if not records:
        raise ValueError(f"no results in {results}: its files have no record")
    order = {op: rank for rank, op in enumerate(SLOTS)}
    return sorted(records, key=lambda r: (r.device, order.get(r.op, len(order)), r.op, r.case, r.direction, r.kernel))


def write(records: Sequence[Record], out: str | Path) -> Path:
    """Write report.md and its plots into a folder; give the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Measured kernels\n"]
    for device, group in groupby(records, key=lambda r: r.device):
        of_device = list(group)
        stem = "".join(c if c.isalnum() else "-" for c in device.lower())
        parts += [f"## {device}\n", _provenance(of_device), _table(of_device)]
        if any(r.ratio for r in of_device):
            _plot_ratios(of_device, out / f"{stem}-ratios.png")
            parts.append(f"![peer time over ours, {device}]({stem}-ratios.png)\n")
        for op, of_op in groupby(of_device, key=lambda r: r.op):
            _plot_times(op, list(of_op), out / f"{stem}-{op}.png")
            parts.append(f"![{op}, {device}]({stem}-{op}.png)\n")
    page = out / "report.md"
    page.write_text("\n".join(parts))
    return page


def _provenance(records: Iterable[Record]) -> str:
    def values(name: str) -> str:
        return ", ".join(sorted({value for r in records if (value := getattr(r, name))}))

    return (
        f"torch {values('torch')}; triton {values('triton') or 'none'}; commit {values('commit')}; {values('date')}\n"
    )


def _table(records: Iterable[Record]) -> str:
    header = ("slot", "op", "case", "kernel", "pass", "ms", "µs/step", "TFLOP/s", "ratio to peer", "peer", "peak MiB")
    rows = [
        (
            SLOTS.get(r.op, "–"),
            r.op,
            r.case,
            r.kernel,
            r.direction,
            f"{r.ms:.3g}" if r.ms < 100 else f"{r.ms:.0f}",
            _number(us_per_step(r.op, r.case, r.ms), ".3g"),
            _number(r.tflops, ".0f" if (r.tflops or 0) >= 10 else ".2g"),
            _number(r.ratio, ".2f"),
            _peer(r),
            _number(r.peak_mib, ".0f"),
        )
        for r in records
    ]
    aligned = ["---"] * 5 + ["---:"] * 4 + ["---", "---:"]
    return "".join("| " + " | ".join(cells).replace("\n", " ") + " |\n" for cells in (header, aligned, *rows))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _peer(record: Record) -> str:
    return (record.peer or "–").removeprefix("peer:")


def _label(record: Record) -> str:
    return f"{record.case}\n{record.kernel}, {record.direction}"


def _plot_times(op: str, records: Sequence[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.8 * len(records)), layout="constrained")
    axes = figure.subplots()
    bars = (("ms", "ours", "#0072b2"), ("peer_ms", "peer", "#e69f00"), ("floor_ms", "floor", "#999999"))
    for shift, (name, label, colour) in enumerate(bars):
        shown = [(row, getattr(r, name)) for row, r in enumerate(records) if getattr(r, name)]
        if shown:
            rows, values = zip(*shown, strict=True)
            drawn = axes.barh([row + 0.27 * (shift - 1) for row in rows], values, 0.25, label=label, color=colour)
            axes.bar_label(drawn, fmt=" %.3g", fontsize=7)
    axes.set_yticks(range(len(records)), [_label(r) for r in records], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms (shorter is faster)")
    axes.set_title(op)
    axes.legend()
    figure.savefig(path, dpi=120)


def _plot_ratios(records: Sequence[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    records = [r for r in records if r.ratio]
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(records)), layout="constrained")
    axes = figure.subplots()
    colours = ["#0072b2" if r.ratio >= 1 else "#d55e00" for r in records]
    axes.bar_label(axes.barh(range(len(records)), [r.ratio for r in records], color=colours), fmt=" %.2f", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    labels = [f"{r.op} {r.direction} beside {_peer(r)}\n{r.case}" for r in records]
    axes.set_yticks(range(len(records)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("peer's time / ours (above 1: ours is faster)")
    axes.set_title(f"Beside peers on {records[0].device}")
    figure.savefig(path, dpi=120)
