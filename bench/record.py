"""What a bench measured: one record a case, merged into bench/results/<device>.json."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nam56r.report.bench import us_per_step

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
KEY = ("op", "case", "kernel", "pass")
FIELDS = (
    *KEY,
    "ms",
    "tflops",
    "gbs",
    "peak_mib",
    "first_call_s",
    "peer",
    "peer_ms",
    "ratio",
    "floor_ms",
    "commit",
    "torch",
    "triton",
    "device",
    "date",
)


def commit() -> str:
    """HEAD's short hash, with "-dirty" when tracked files other than results differ.

    Where git can't say, NAM56R_COMMIT, or "unknown".
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NAM56R_COMMIT", "unknown")
    return f"{head}-dirty" if dirty else head


def record(
    op: str,
    case: str,
    kernel: str,
    passed: str,
    *,
    ms: float,
    device: str,
    flops: float | None = None,
    moved: float | None = None,
    peak_mib: float | None = None,
    first_call_s: float | None = None,
    peer: str | None = None,
    peer_ms: float | None = None,
    floor_ms: float | None = None,
) -> Record:
    """One record with every field of FIELDS; what wasn't measured is None.

    passed is "fwd" or "fwd+bwd", flops and moved (bytes) what that pass does at the least, ms its median time,
    peak_mib the memory it took above its inputs, first_call_s its first call with all compiling, ratio peer_ms / ms.
    """
    if passed not in ("fwd", "fwd+bwd"):
        raise ValueError(f"pass is {passed!r}, but must be 'fwd' or 'fwd+bwd'")
    values = {
        "op": op,
        "case": case,
        "kernel": kernel,
        "pass": passed,
        "ms": ms,
        "tflops": flops and flops / ms / 1e9,
        "gbs": moved and moved / ms / 1e6,
        "peak_mib": peak_mib,
        "first_call_s": first_call_s,
        "peer": peer,
        "peer_ms": peer_ms,
        "ratio": peer_ms and peer_ms / ms,
        "floor_ms": floor_ms,
        "commit": commit(),
        "torch": version("torch"),
        "triton": version("triton"),
        "device": device,
        "date": datetime.date.today().isoformat(),
    }
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}


def path_of(results: Path, device: str) -> Path:
    """results/<device>.json, where device is a registry name ("h200") or what the driver calls it."""
    return results / f"{'-'.join(device.lower().split())}.json"


def merge(path: Path, new: Iterable[Record]) -> list[Record]:
    """Put records into a results file, each in the place of the one with the same op, case, kernel and pass.

    The file is replaced as a whole, so that a stopped run leaves the old one or the new one. Returns what it holds.
    """
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    held = {tuple(r[k] for k in KEY): r for r in (*old, *new)}
    records = [held[key] for key in sorted(held)]
    _write(path, records)
    return records


def keep_errors(results: Path, op: str, case: str, device: str, errors: dict[str, dict[str, float]]) -> Path:
    """Write {case, commit, date, device, errors} to results/<device>-<op>-error.json in place of what it held.

    errors: {"y" or a gradient's name: {kernel: ‖x − exact‖ / ‖exact‖}}. Returns the path.
    """
    path = path_of(results, f"{device} {op} error")
    rounded = {name: {kernel: float(f"{e:.5g}") for kernel, e in of.items()} for name, of in errors.items()}
    today = datetime.date.today().isoformat()
    _write(path, {"case": case, "commit": commit(), "date": today, "device": device, "errors": rounded})
    return path


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def table(records: Iterable[Record]) -> list[str]:
    """Records as lines for a terminal; a recurrence's with its time by the step."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    heads = (
        "op",
        "case",
        "kernel",
        "pass",
        "ms",
        "us/step",
        "tflops",
        "gbs",
        "peak_mib",
        "first_call_s",
        "floor_ms",
        "peer",
        "ratio",
    )
    shown = (r | {"us/step": us_per_step(r["op"], r["case"], r["ms"])} for r in records)
    rows = [heads, *([cell(r[h]) for h in heads] for r in shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
