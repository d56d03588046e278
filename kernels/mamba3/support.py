"""The kernels of mamba3_scan and mamba3_step, best first."""

import torch

from nam56r.kernels import triton_runtime
from nam56r.kernels.mamba3 import cuda, reference, step
from nam56r.kernels.registry import Kernel, Problem
from nam56r.kernels.ssd import support
from nam56r.kernels.ssd.sizes import MIMO, SISO


def _cuda_refuses(problem: Problem) -> tuple[str, ...]:
    model = SISO if problem["psi"] is None else MIMO
    return support.refuses(problem, model, problem["B"].shape[2], problem["angles"].shape[-1])


def _step_refuses(problem: Problem) -> tuple[str, ...]:
    x, (_, rank, _, d_state) = problem["x"], problem["B"].shape
    reasons = list(triton_runtime.reason(problem))
    if x.dtype == torch.float64:
        reasons.append("x is torch.float64, but the Triton kernel takes bfloat16, float16 or float32")
    if not 1 <= x.shape[-1] <= 128:
        reasons.append(f"P = {x.shape[-1]}, but the Triton kernel takes 1 to 128")
    if not 2 <= d_state <= 256:
        reasons.append(f"N = {d_state}, but the Triton kernel takes 2 to 256")
    if not 1 <= rank <= 8:
        reasons.append(f"R = {rank}, but the Triton kernel takes 1 to 8")
    return tuple(reasons)


KERNELS = (
    Kernel("mamba3_scan", "cuda", cuda.mamba3_scan, _cuda_refuses),
    Kernel("mamba3_scan", "reference", reference.mamba3_scan, role="development"),
    Kernel("mamba3_step", "triton", step.mamba3_step, _step_refuses),
    Kernel("mamba3_step", "reference", reference.mamba3_step, role="development"),
)
