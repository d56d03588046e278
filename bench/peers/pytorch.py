"""What a user would write in plain PyTorch, eager: the head's logits stored whole, RMSNorm by hand, grouped conv1d."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel, Problem


def linear_cross_entropy(hidden, weight, labels, ignore_index, z_loss):
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    return loss + z_loss * logits.logsumexp(-1).square().masked_fill(labels == ignore_index, 0) if z_loss else loss


def rms_norm(x, weight, eps, residual):
    s = x if residual is None else x + residual
    wide = s.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return y if residual is None else (y, s)


def causal_conv1d(x, weight, bias, activation, initial_state, cu_seqlens):
    width = weight.shape[1]
    y = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], bias, groups=len(weight)).mT
    return F.silu(y) if activation == "silu" else y, x[:, 1 - width :]


def _whole_sequences(problem: Problem) -> tuple[str, ...]:
    left_out = [name for name in ("initial_state", "cu_seqlens") if problem[name] is not None]
    return (*not_installed("torch")(problem), *(f"takes no {name}" for name in left_out))


KERNELS = (
    Kernel("causal_conv1d", "peer:pytorch", causal_conv1d, _whole_sequences, role="peer"),
    Kernel("linear_cross_entropy", "peer:pytorch", linear_cross_entropy, not_installed("torch"), role="peer"),
    Kernel("rms_norm", "peer:pytorch", rms_norm, not_installed("torch"), role="peer"),
)
