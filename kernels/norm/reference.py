"""RMSNorm by its definition."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `nam56r.kernels.norm.rms_norm`. compute_dtype: None is fp32, or fp64 for fp64 inputs."""
    compute = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    s = x.to(compute)
    if residual is not None:
        s = s + residual.to(compute)
    y = s * (s.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(compute)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), s.to(x.dtype))
