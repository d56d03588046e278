"""Routed experts by their definition: one expert after the other over the tokens that chose it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(hidden: torch.Tensor, activation: str) -> torch.Tensor:
    """relu(h)², or silu of the first half times the second."""
    if activation == "relu2":
        return hidden.relu().square()
    gated, linear = hidden.chunk(2, -1)
    return F.silu(gated) * linear


def moe_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    activation: str = "relu2",
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `nam56r.kernels.moe.moe_experts`. compute_dtype: None is fp32, or fp64 for fp64 inputs."""
    compute = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    tokens, scale = x.to(compute), gates.to(compute)
    out = torch.zeros_like(tokens)
    for expert, (up, down) in enumerate(zip(w_up.to(compute), w_down.to(compute))):
        token, slot = torch.where(expert_ids == expert)
        y = activate(tokens[token] @ up.T, activation) @ down.T
        out = out.index_add(0, token, scale[token, slot, None] * y)
    return out.to(x.dtype)
