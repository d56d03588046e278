"""What this machine has, and which kernel each kind of slot could run on here and on an H200, with reasons."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nam56r.kernels import extension, nvrtc
from nam56r.kernels.registry import DEVICES, Device, Problem, candidates
from nam56r.problems import Workload
from nam56r.recipe import Recipe
from nam56r.report.table import wrap

SLOTS = {
    "mla": "A dense: MLA",
    "dsa": "A sparse: DSA",
    "moe": "E: experts",
    "mamba3": "M: Mamba-3",
    "mamba2": "M: Mamba-2",
    "m2rnn": "R: M²RNN",
    "mtp": "MTP depth",
    "head": "head",
}
PACKAGES = ("torch", "triton", "cupy-cuda13x", "megatron-core", "transformer-engine", "numpy", "pydantic")
WITHOUT = {"transformer-engine": "not installed (not needed)"}


def examine() -> dict[str, Any]:
    """Everything `nam56r doctor` says, as JSON: machine, gpus, versions, extension, compiled, and slots by device."""
    here = Device.of("cuda" if torch.cuda.is_available() else "cpu")
    why_not = extension.load()
    return {
        "machine": _machine(),
        "gpus": _gpus(),
        "driver": _driver(),
        "versions": _versions(),
        "extension": {"loaded": why_not is None, "reason": why_not, "archs": list(extension.archs())},
        "compiled": {
            "folder": str(nvrtc.folder()),
            "reason": nvrtc.missing(),
            "units": [unit.model_dump(mode="json") for unit in nvrtc.cached()],
        },
        "recipe": "nam56r",
        "slots": {device.name: runnable(Recipe.load("nam56r"), device) for device in (here, DEVICES["h200"])},
    }


def runnable(recipe: Recipe, device: Device) -> dict[str, dict[str, dict[str, Any]]]:
    """slot -> operator -> {"kernel": the one that would run or None, "refused": {candidate: reasons}}.

    At the recipe's shapes, micro-batch 1, in fp32 on a CPU and bf16 elsewhere.
    """
    work = Workload(recipe, 1, 1, torch.float32 if device.type == "cpu" else torch.bfloat16)
    slots = {}
    for role, name in SLOTS.items():
        operators = {}
        for operator, arguments in work.operators(role).items():
            problem = Problem.of(operator, device, **arguments)
            reasons = {k.name: k.reasons(problem, by_name=False) for k in candidates(operator) if k.role != "peer"}
            operators[operator] = {
                "kernel": next((name for name, why in reasons.items() if not why), None),
                "refused": {name: list(why) for name, why in reasons.items() if why},
            }
        slots[name] = operators
    return slots


def render(found: dict[str, Any], width: int = 80) -> str:
    """What `examine` found, as text; width in columns."""
    machine, built = found["machine"], found["extension"]
    gpus = "; ".join(
        f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']:.0f} GiB" for gpu in found["gpus"]
    )
    rows = {
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB",
        "GPU": gpus or "none that PyTorch can use",
        "driver": found["driver"] or "none",
        "system": machine["system"],
        **found["versions"],
        "extension": f"loaded, for {', '.join(f'sm_{a}' for a in built['archs'])}"
        if built["loaded"]
        else built["reason"],
    }
    lines = [wrap(f"{name:<20}{value}", width, 20) for name, value in rows.items()]
    compiled = found["compiled"]
    lines += ["", wrap(f"Kernels compiled at run time, in {compiled['folder']}:", width, 2)]
    lines += [wrap(f"  {_unit(unit)}", width, 6) for unit in compiled["units"]] or ["  none yet"]
    if compiled["reason"]:
        lines.append(wrap(f"  none can be compiled here: {compiled['reason']}", width, 6))
    devices = list(found["slots"])
    lines += ["", f"What the slots of {found['recipe']} would run on:", _row("", *devices), "-" * width]
    for slot in SLOTS.values():
        lines.append(slot)
        for operator in found["slots"][devices[0]][slot]:
            answers = {device: found["slots"][device][slot][operator] for device in devices}
            lines.append(_row(f"  {operator}", *(answer["kernel"] or "none" for answer in answers.values())))
            for device, answer in answers.items():
                shown = {
                    kernel: why
                    for kernel, why in answer["refused"].items()
                    if not answer["kernel"] or kernel != "reference"
                }
                lines += [
                    wrap(f"      {kernel} not on {device}: {'; '.join(why)}", width, 8) for kernel, why in shown.items()
                ]
    return "\n".join(lines)


def _row(first: str, *others: str) -> str:
    return (f"{first:<28}" + "".join(f"{other:<14}" for other in others)).rstrip()


def _unit(unit: dict[str, Any]) -> str:
    when = datetime.fromisoformat(unit["compiled"]).astimezone()
    size = f"{unit['size'] / 2**10:.0f} KiB"
    what = f"{unit['family']} {', '.join(unit['what'])}: {unit['arch']}"
    return f"{what}, {when:%Y-%m-%d %H:%M}, {unit['seconds']:.1f} s, {size}"


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": _memory() / 2**30,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _memory() -> int:
    """Bytes of memory, or the control group's limit where that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.exists() else "max"
    return memory if said == "max" else min(memory, int(said))


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": gpu.total_memory / 2**30}
        for gpu in found
    ]


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {error}"
    lines = said.stdout.split("\n")
    return lines[0].strip() if said.returncode == 0 else f"nvidia-smi fails: {lines[0].strip() or said.returncode}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = WITHOUT.get(package, "not installed")
    return found | {"CUDA of torch": torch.version.cuda or "none"}
