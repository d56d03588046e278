"""Other projects' kernels, measured beside ours: one file a project, each with `KERNELS` of role "peer".

A kernel is named peer:<project>. A file here imports its project only when a kernel runs, and refuses with
`not_installed` until then, so that the bench says what is missing and goes on.

    KERNELS = (Kernel("rms_norm", "peer:liger", run=rms_norm, refuses=not_installed("liger_kernel"), role="peer"),)
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable

from nam56r.kernels.registry import Kernel, Problem, register


def not_installed(module: str) -> Callable[[Problem], tuple[str, ...]]:
    """A `refuses` that asks for a CUDA device and for the project's module."""

    def refuses(problem: Problem) -> tuple[str, ...]:
        device = () if problem.device.type == "cuda" else ("needs a CUDA device",)
        return device if importlib.util.find_spec(module) else (*device, f"{module} is not installed")

    return refuses


def register_all() -> tuple[Kernel, ...]:
    """Register the kernels of every file here; gives them."""
    kernels = tuple(
        kernel
        for module in pkgutil.iter_modules(__path__)
        for kernel in importlib.import_module(f"{__name__}.{module.name}").KERNELS
    )
    for kernel in kernels:
        if kernel.role != "peer" or not kernel.name.startswith("peer:"):
            raise ValueError(f"{kernel.operator}={kernel.name}: a peer is named peer:<project> and has the role 'peer'")
        register(kernel)
    return kernels
