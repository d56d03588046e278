"""Linear and cross-entropy by their definition. Stores the logits, and autograd stores them again."""

from __future__ import annotations

import torch


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `nam56r.kernels.cross_entropy.linear_cross_entropy`. compute_dtype: None is fp32, or fp64 for fp64 inputs."""
    loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
    compute = compute_dtype or loss_dtype
    logits = hidden.to(compute) @ weight.to(compute).T  # [T, V]
    lse = logits.logsumexp(-1)
    ignored = labels == ignore_index
    wrong = ((labels < 0) | (labels >= weight.shape[0])) & ~ignored
    target = logits.gather(1, torch.where(wrong | ignored, 0, labels)[:, None])[:, 0]
    loss = (lse - target + z_loss * lse.square()).to(loss_dtype).masked_fill(ignored, 0.0)
    return loss * torch.where(wrong, torch.nan, 1.0).to(loss_dtype)
