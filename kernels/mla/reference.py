"""The definition of multi-head latent attention: a plain softmax over all scores, which are stored ([B, H, S, S])."""

from __future__ import annotations

import torch


def mla_attention(q, k_nope, k_rope, v, *, scale, causal=True, cu_seqlens=None, compute_dtype=None):
    """Expanded: every head has its own key [k_nope | k_rope] and value."""
    rope = k_rope.unsqueeze(2).expand(*k_nope.shape[:3], -1)
    return _attend(q, torch.cat((k_nope, rope), -1), v, scale, causal, cu_seqlens, compute_dtype)


def latent_attention(q, kv, *, value_dim, scale, causal=True, cu_seqlens=None, compute_dtype=None):
    """Absorbed: one key kv for all heads; its first value_dim features are also the value."""
    kv = kv.unsqueeze(2)
    return _attend(q, kv, kv[..., :value_dim], scale, causal, cu_seqlens, compute_dtype)


def visible(length: int, causal: bool, cu_seqlens: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which key s a query t sees: [S, S] bool, [t, s]."""
    position = torch.arange(length, dtype=torch.int32, device=device)
    start = torch.zeros_like(position)
    if cu_seqlens is not None:
        start = cu_seqlens[torch.bucketize(position, cu_seqlens[1:], right=True)]
    seen = start[:, None] == start
    return seen & (position[:, None] >= position) if causal else seen


def _attend(q, k, v, scale, causal, cu_seqlens, compute_dtype):
    """q [B, S, H, D], k [B, S, H or 1, D], v [B, S, H or 1, Dv]."""
    dtype = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    query, key, value = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    scores = scale * (query @ key.mT)
    scores = scores.masked_fill(~visible(q.shape[1], causal, cu_seqlens, q.device), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).to(q.dtype)
