"""RMSNorm with an optional residual add (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes
from nam56r.kernels.norm import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = s / sqrt(mean(s²) + eps) · weight over the last dimension, where s = x + residual (or x).

    x, residual  [..., D]  bf16, fp16, fp32 or fp64, both the same
    weight       [D]       the dtype of x, or fp32
    eps          at least 0
    kernel       a name from the registry; None takes the first that accepts the problem

    Returns y, or (y, s) when residual is given, in x's dtype. The mean is taken in fp32 (fp64 for fp64 inputs).
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    sizes = Shapes("rms_norm")
    leading = range(x.ndim - 1) if isinstance(x, torch.Tensor) else ()
    shape = " ".join([*(f"N{i}" for i in leading), "D"])
    sizes.bind("x", x, shape, FLOATS)
    sizes.bind("weight", weight, "D", tuple(dict.fromkeys((x.dtype, torch.float32))))
    sizes.bind("residual", residual, shape, (x.dtype,), optional=True)
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"rms_norm: eps is {eps!r}, but must be a number of at least 0")
    problem = Problem.of("rms_norm", x=x, weight=weight, residual=residual)
    return select(problem, kernel).run(x, weight, eps, residual)
