"""The kernels of moe_experts, best first."""

from __future__ import annotations

import torch

from nam56r.kernels.moe import library, reference
from nam56r.kernels.registry import Kernel, Problem


def _library_refuses(problem: Problem) -> tuple[str, ...]:
    device, dtype = problem.device, problem["x"].dtype
    experts, hidden, width = problem["w_down"].shape
    reasons = []
    if device.type == "cuda":
        if device.capability != (9, 0):
            reasons.append(
                "torch._grouped_mm is graph-safe and right on compute capability 9.0, not on "
                f"{device.capability}: before it, offsets are read on the host; after it, experts without tokens get a "
                "wrong gradient (pytorch issue 172439)"
            )
        if dtype != torch.bfloat16:
            reasons.append(f"torch._grouped_mm reads offsets on the host for {dtype}: only bfloat16 is graph-safe")
        if experts >= 1024:
            reasons.append(f"torch._grouped_mm takes fewer than 1024 experts, not {experts}")
    elif dtype == torch.float64:
        reasons.append("torch._grouped_mm takes bfloat16, float16 and float32, not float64")
    step = 16 // dtype.itemsize
    if hidden % step or width % step:
        reasons.append(f"D = {hidden} and F = {width} must be multiples of {step} (rows of whole 16 bytes)")
    return tuple(reasons)


KERNELS = (
    Kernel("moe_experts", "torch", library.moe_experts, _library_refuses),
    Kernel("moe_experts", "reference", reference.moe_experts, role="development"),
)
