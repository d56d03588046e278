"""The definition of DeepSeek sparse attention, a block of queries at a time.

Scores exist for one block only where no gradient keeps them: top-k takes O(BLOCK · Hi · S) memory. What autograd
keeps is O(S · K) per head in the sparse operators, and O(S²) per index head in the dense stage of the loss.
"""

from __future__ import annotations

import torch

from nam56r.kernels.dsa.status import flag

BLOCK = 128


@torch.no_grad()
def index_top_k(q, k, weights, top_k, *, cu_seqlens=None, compute_dtype=None):
    """Keys ordered by (may be chosen, score descending, index ascending); the first top_k, ascending by index."""
    length = q.shape[1]
    q, k, weights = _cast(compute_dtype or _wide(q), q, k, weights)
    position = torch.arange(length, dtype=torch.int32, device=q.device)
    start = torch.zeros_like(position)
    if cu_seqlens is not None:
        start = cu_seqlens[torch.bucketize(position, cu_seqlens[1:], right=True)]
    none = torch.iinfo(torch.int32).max
    chosen = []
    for t in _blocks(length):
        score = index_scores(q[:, t], k, weights[:, t])  # [B, T, S]
        seen = (position <= position[t, None]) & (position >= start[t, None])
        flag(q.device).bitwise_or_((seen & score.isnan()).any())
        may = seen & ~score.isnan()
        order = score.masked_fill(~may, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        last = (~may).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True)  # behind the keys that score -inf
        order = order.gather(-1, last)[..., :top_k]
        picked = torch.where(may.gather(-1, order), order, none).sort(-1).values
        chosen.append(torch.where(picked == none, -1, picked).to(torch.int32))
    indices = torch.cat(chosen, 1)
    return torch.nn.functional.pad(indices, (0, top_k - indices.shape[-1]), value=-1)


def sparse_latent_attention(q, kv, indices, *, value_dim, scale, compute_dtype=None):
    dtype, given = compute_dtype or _wide(q), q.dtype
    q, kv = _cast(dtype, q, kv)
    outs, lses = [], []
    for t in _blocks(q.shape[1]):
        present = indices[:, t, None] >= 0  # [B, T, 1, K]
        keys = _gather(kv, indices[:, t])  # [B, T, K, L + Dr]
        scores = scale * _dot(q[:, t], keys)  # [B, T, H, K]
        probabilities = _without(scores, present).softmax(-1).masked_fill(~present, 0)
        outs.append(torch.einsum("bthk,btkd->bthd", probabilities, keys[..., :value_dim]))
        lses.append(scores.detach().masked_fill(~present, -torch.inf).logsumexp(-1))
    return torch.cat(outs, 1).to(given), torch.cat(lses, 1).to(torch.promote_types(dtype, torch.float32))


def indexer_kl_loss(index_q, index_k, index_weights, q, kv, indices, lse, *, scale, compute_dtype=None):
    dtype = compute_dtype or torch.promote_types(_wide(index_q), _wide(q))
    index_q, index_k, index_weights = _cast(dtype, index_q, index_k, index_weights)
    q, kv = _cast(dtype, q.detach(), kv.detach())
    position = torch.arange(q.shape[1], device=q.device)
    losses = []
    for t in _blocks(q.shape[1]):
        if indices is None:
            present = position[: t.stop] <= position[t, None]  # [T, keys up to the block's end]
            keys, index_keys = kv[:, : t.stop], index_k[:, : t.stop]
        else:
            present = indices[:, t] >= 0  # [B, T, K]
            keys, index_keys = _gather(kv, indices[:, t]), _gather(index_k, indices[:, t])
        scores = (scale * _dot(q[:, t], keys)).masked_fill(~present.unsqueeze(-2), -torch.inf)
        total = scores.logsumexp(-1) if lse is None else lse[:, t].detach().to(dtype)
        target = (scores - total.unsqueeze(-1)).exp().masked_fill(~present.unsqueeze(-2), 0).sum(2)
        target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        predicted = _without(index_scores(index_q[:, t], index_keys, index_weights[:, t]), present).log_softmax(-1)
        predicted = predicted.masked_fill(~present, 0)
        losses.append(torch.nn.functional.kl_div(predicted, target, reduction="none").sum(-1))
    return torch.cat(losses, 1).to(torch.promote_types(dtype, torch.float32))


def rounded_to_e4m3(x):
    """x [..., D] in fp32 as the nearest rows of e4m3 times a power of two each, the least that keeps the row within 448.

    Exact but for e4m3's three bits and, 2^-17 of a row's largest or less, its least step. A row with inf or NaN is NaN.
    """
    largest = x.float().abs().amax(-1, keepdim=True)
    part, exponent = largest.frexp()  # 448 = 0.875 · 2^9
    scale = torch.ldexp(torch.ones_like(part), (exponent - 9 + (part > 0.875)).clamp_min(-126))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def index_scores(q, k, weights):
    """I = Σ_h w_h · relu(q_h · k): q [B, T, Hi, Di], weights [B, T, Hi], k as in `_dot`; gives [B, T, keys]."""
    return torch.einsum("bth,bthk->btk", weights, _dot(q, k).relu())


def _dot(q, k):
    """Every query with every key k [B, S, D], or with keys of its own k [B, T, K, D]: [B, T, H, keys]."""
    return torch.einsum("bthd,bkd->bthk" if k.ndim == 3 else "bthd,btkd->bthk", q, k)


def _gather(rows, indices):
    """rows [B, S, D] at indices [B, T, K]: [B, T, K, D], zeros where the index is -1."""
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))[batch, indices]  # -1 is the row of zeros at the end


def _without(scores, present):
    """-inf where a key isn't present, for a softmax; rows without any stay as they are, for -inf alone gives NaN."""
    return scores.masked_fill(~present & present.any(-1, keepdim=True), -torch.inf)


def _blocks(length):
    return (slice(start, start + BLOCK) for start in range(0, max(length, 1), BLOCK))


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _cast(dtype, *tensors):
    return (tensor.to(dtype) for tensor in tensors)
