"""Megatron's DeepSeek sparse attention without its fused kernels: scores [B, S, S] in fp32, torch.topk, a dense masked softmax.

Its scores pass through [S, B, Hi, S] in fp32, and its attention through [B, H, S, S], so that long sequences don't fit.
"""

from __future__ import annotations

import math

import torch

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel, Problem


def _mask(length: int, device: torch.device) -> torch.Tensor:
    return torch.full((length, length), -math.inf, device=device).triu(1)


def index_top_k(q, k, weights, top_k, *, cu_seqlens):
    from megatron.core.transformer.experimental_attention_variant.dsa import fused_qk_topk_naive

    q, k, weights = (t.transpose(0, 1) for t in (q, k, weights))
    return fused_qk_topk_naive(q, k, weights, top_k, mask=_mask(q.shape[0], q.device))[1]


def sparse_latent_attention(q, kv, indices, *, value_dim, scale):
    """Without lse, which Megatron doesn't give."""
    from megatron.core.transformer.experimental_attention_variant.dsa import _unfused_absorbed_dsa_fn

    query, key = q.transpose(0, 1), kv.transpose(0, 1).unsqueeze(2)
    mask = _mask(query.shape[0], q.device)
    return _unfused_absorbed_dsa_fn(query, key, indices, scale, value_dim, mask=mask).transpose(0, 1), None


def top_k_and_loss(q, k, weights, top_k, attention_q, kv, scale):
    """Indices and the sparse stage's loss, which Megatron makes together."""
    from types import SimpleNamespace

    from megatron.core.transformer.experimental_attention_variant.dsa import FusedDSAIndexerLoss

    q, k, weights = (t.transpose(0, 1) for t in (q, k, weights))
    query = attention_q.detach().transpose(0, 1)
    key = kv.detach().transpose(0, 1).unsqueeze(2).expand(-1, -1, query.shape[2], -1)
    mask, group = _mask(q.shape[0], q.device), SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    return FusedDSAIndexerLoss.apply(
        q, weights, k, query, key, scale, top_k, 1.0, mask, True, group, None, None, None, None, False
    )


def _refuses(problem: Problem) -> tuple[str, ...]:
    packed = problem.operator == "index_top_k" and problem["cu_seqlens"] is not None
    return (*not_installed("megatron")(problem), *(("asked for one sequence a row",) if packed else ()))


KERNELS = (
    Kernel("index_top_k", "peer:megatron", index_top_k, _refuses, role="peer"),
    Kernel("sparse_latent_attention", "peer:megatron", sparse_latent_attention, _refuses, role="peer"),
)
