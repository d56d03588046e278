"""cuDNN's attention through PyTorch, and what its user does before it: RoPE, and keys written out for every head.

cuDNN is pinned: where PyTorch wouldn't take it, it raises, and nothing falls back. It also takes keys and values of one
head that all share (PyTorch's enable_gqa), but through PyTorch no packed sequences. Those go to FlashAttention-2
(torch.nn.attention.varlen), which wants v as wide as q and k, and the longest length on the host.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.peers import not_installed
from nam56r.kernels.mla.library import backend
from nam56r.kernels.registry import Kernel, Problem, Spec


def whole(q, k, v, scale, causal=True):
    """cuDNN: q [B, S, H, D], k [B, S, H or 1, D], v [B, S, H or 1, Dv] to [B, S, H, Dv]."""
    shared = k.shape[2] < q.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


def packed(q, k, v, scale, cu_seqlens, longest):
    """FlashAttention-2, causal: q [1, S, H, D], k and v [1, S, H or 1, D] to [1, S, H, D]."""
    q, k, v = (t[0] for t in (q, k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0))[None]


def turned(t, cos, sin):
    """RoPE as Megatron's MLA does it without Transformer Engine: t [B, S, H, Dr] in pairs; cos, sin [S, 1, Dr].

    Megatron also makes cos and sin anew at every call and copies the result once more; both are left out.
    """
    t = torch.cat((t[..., 0::2], t[..., 1::2]), -1)
    x, y = t.chunk(2, -1)
    return t * cos + torch.cat((-y, x), -1) * sin


def prepared(q, k_nope, k_rope, v, cos, sin, wide=False):
    """q, k, v for attention: q [B, S, H, Dn + Dr] and k_rope [B, S, Dr] are turned, k_nope [B, S, H or 1, Dn] joined.

    wide: v is padded with zeros to q's width.
    """
    q_nope, q_rope = q.split((k_nope.shape[-1], k_rope.shape[-1]), -1)
    q = torch.cat((q_nope, turned(q_rope, cos, sin)), -1)
    return q, written_out(k_nope, turned(k_rope.unsqueeze(2), cos, sin)), padded(v, q) if wide else v


def written_out(k_nope, k_rope):
    """k [B, S, H, Dn + Dr] from k_nope [B, S, H, Dn] and the k_rope [B, S, 1, Dr] that all heads share."""
    return torch.cat((k_nope, k_rope.expand(*k_nope.shape[:3], -1)), -1)


def padded(v, q):
    """v with zeros up to q's width."""
    return pad(v, (0, q.shape[-1] - v.shape[-1]))


def mla_attention(q, k_nope, k_rope, v, *, scale, causal, cu_seqlens, query_offset, return_lse):
    return whole(q, written_out(k_nope, k_rope.unsqueeze(2)), v, scale, causal)


def latent_attention(q, kv, *, value_dim, scale, causal, cu_seqlens, query_offset, return_lse):
    k = kv.unsqueeze(2).expand(-1, -1, q.shape[2], -1)
    return whole(q, k.contiguous(), k[..., :value_dim].contiguous(), scale, causal)


def _refuses(problem: Problem) -> tuple[str, ...]:
    q = problem["q"]
    if problem.operator == "latent_attention":
        keys, width = problem["kv"].shape[1], problem["value_dim"]
    else:
        keys, width = problem["v"].shape[1], problem["v"].shape[3]
    taken = backend(problem.device, q, Spec((*q.shape[:3], width), q.dtype)) == SDPBackend.CUDNN_ATTENTION
    taken = taken and q.shape[3] % 8 == width % 8 == 0
    asked = f"{str(q.dtype).removeprefix('torch.')}, {q.shape[1]} tokens, head dims {q.shape[3]}/{width}"
    reasons = {
        f"PyTorch gives cuDNN no {asked}": not taken,
        "through PyTorch it takes no packed sequences": problem["cu_seqlens"] is not None,
        "it takes as many keys as queries, and no query_offset": problem["query_offset"] or keys != q.shape[1],
        "through PyTorch it returns no logsumexp": problem["return_lse"],
    }
    return (*not_installed("torch")(problem), *(reason for reason, holds in reasons.items() if holds))


KERNELS = (
    Kernel("latent_attention", "peer:cudnn", latent_attention, _refuses, role="peer"),
    Kernel("mla_attention", "peer:cudnn", mla_attention, _refuses, role="peer"),
)
