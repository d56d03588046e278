"""The kernels of causal_conv1d, best first."""

from __future__ import annotations

from nam56r.kernels import extension
from nam56r.kernels.conv1d import cuda, reference
from nam56r.kernels.registry import Kernel, Problem


def _cuda_refuses(problem: Problem) -> tuple[str, ...]:
    reasons = extension.reason(problem)
    if not reasons and not cuda.REGISTERED:
        reasons = ("CUDA extension built from older sources, without conv1d: install the package again",)
    if problem["x"].dtype not in cuda.DTYPES:
        reasons = (*reasons, f"x is {problem['x'].dtype}, but the CUDA kernel takes bfloat16, float16 or float32")
    return reasons


KERNELS = (
    Kernel("causal_conv1d", "cuda", cuda.causal_conv1d, _cuda_refuses),
    Kernel("causal_conv1d", "reference", reference.causal_conv1d, role="development"),
)
