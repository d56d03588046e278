"""The definition of multi-head latent attention: a plain softmax over all scores, which are stored ([B, H, S, S])."""

from __future__ import annotations

import torch


def mla_attention(
    q, k_nope, k_rope, v, *, scale, causal=True, cu_seqlens=None, query_offset=0, return_lse=False, compute_dtype=None
):
    """Expanded: every head has its own key [k_nope | k_rope] and value."""
    rope = k_rope.unsqueeze(2).expand(*k_nope.shape[:3], -1)
    seen = visible(q.shape[1], v.shape[1], causal, cu_seqlens, query_offset, q.device)
    return _attend(q, torch.cat((k_nope, rope), -1), v, scale, seen, return_lse, compute_dtype)


def latent_attention(
    q, kv, *, value_dim, scale, causal=True, cu_seqlens=None, query_offset=0, return_lse=False, compute_dtype=None
):
    """Absorbed: one key kv for all heads; its first value_dim features are also the value."""
    kv = kv.unsqueeze(2)
    seen = visible(q.shape[1], kv.shape[1], causal, cu_seqlens, query_offset, q.device)
    return _attend(q, kv, kv[..., :value_dim], scale, seen, return_lse, compute_dtype)


def visible(
    queries: int,
    keys: int,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
    query_offset: int,
    device: torch.device,
) -> torch.Tensor:
    """Which key t a query s sees: [S, T] bool, [s, t]."""
    key = torch.arange(keys, dtype=torch.int32, device=device)
    query = torch.arange(queries, dtype=torch.int32, device=device) + query_offset
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        sequence = torch.bucketize(key, cu_seqlens[1:], right=True)
        seen = sequence[:, None] == sequence
    return seen & (query[:, None] >= key) if causal else seen


def _attend(q, k, v, scale, seen, return_lse, compute_dtype):
    """q [B, S, H, D], k [B, T, H or 1, D], v [B, T, H or 1, Dv], seen [S, T]."""
    dtype = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    query, key, value = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    blind = ~seen.any(-1, keepdim=True)  # queries that see nothing
    scores = (scale * (query @ key.mT)).masked_fill(~seen, -torch.inf).masked_fill(blind, 0)
    out = (scores.softmax(-1).masked_fill(blind, 0) @ value).transpose(1, 2).to(q.dtype)
    if not return_lse:
        return out
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf).transpose(1, 2)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))
