"""The compiled extension, nam56r.kernels._C: whether it is here, why not, and what it was built for.

Loading it registers the operators of csrc/ with PyTorch's dispatcher as torch.ops.nam56r.*.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path

import torch  # the extension needs torch's libraries loaded first

from nam56r.kernels.registry import Problem

MODULE = "nam56r.kernels._C"
HOPPER = (9, 0)  # compute capability
RECORD = Path(__file__).with_name("_build.txt")


@torch.compiler.assume_constant_result  # a traced program asks too, and neither imports nor sys.modules can be traced
def load() -> str | None:
    """Load the extension, once. None when it is loaded, else the reason why it isn't, in one line."""
    return _load()


@functools.cache
def _load() -> str | None:
    try:
        importlib.import_module(MODULE)
    except ModuleNotFoundError:
        said = RECORD.read_text(encoding="utf-8").strip() if RECORD.exists() else "not built"
        return said if said.startswith("not built") else f"not there, though {said}: install the package again"
    except ImportError as error:
        return f"built, but does not load: {str(error).splitlines()[0]}"
    return None


@torch.compiler.assume_constant_result
def archs() -> tuple[str, ...]:
    """The architectures that the loaded extension holds code for, such as ("90a",); empty when it isn't loaded."""
    return () if load() else tuple(sys.modules[MODULE].ARCHS.split())


def covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for arch ("80", "90a", "100f") runs on a device of that compute capability.

    Plain code runs on its major version from its minor upward, "f" code too; "a" code on exactly its own.
    """
    digits, suffix = re.fullmatch(r"(\d+)([af]?)", arch).groups()
    major, minor = int(digits[:-1]), int(digits[-1])
    return (major, minor) == capability if suffix == "a" else major == capability[0] and minor <= capability[1]


def has(*operators: str) -> bool:
    """Whether the extension is loaded and has these operators; one built from older sources may not."""
    return load() is None and all(hasattr(torch.ops.nam56r, name) for name in operators)


def missing(problem: Problem) -> tuple[str, ...]:
    """Why no operator of the extension can serve the problem, whatever it was built for; empty when one may."""
    if problem.device.type != "cuda":
        return (f"a CUDA kernel, but the device is {problem.device.name}",)
    why = load()
    return (f"CUDA extension {why}",) if why else ()


def hopper_only(problem: Problem) -> list[str]:
    """Why kernels of wgmma and TMA can't run on the problem's device, or aren't in the extension that is loaded."""
    device, reasons = problem.device, []
    if device.capability != HOPPER:
        major, minor = device.capability
        reasons.append(f"{device.name} is sm_{major}{minor}, but the CUDA kernel takes sm_90 (H100, H200)")
    if "90a" not in archs():
        have = ", ".join(f"sm_{arch}" for arch in archs())
        reasons.append(
            f"CUDA extension built for {have}, but the CUDA kernel is sm_90a: install with NAM56R_CUDA_ARCHS=90a"
        )
    return reasons


def reason(problem: Problem) -> tuple[str, ...]:
    """Why the extension can't serve the problem's device, present or planned for; empty when it can."""
    absent = missing(problem)
    if absent:
        return absent
    major, minor = problem.device.capability
    if not any(covers(arch, (major, minor)) for arch in archs()):
        have = ", ".join(f"sm_{arch}" for arch in archs())
        want = f"{problem.device.name} is sm_{major}{minor}: install with NAM56R_CUDA_ARCHS={major}{minor}"
        return (f"CUDA extension built for {have}, but {want}",)
    return ()
