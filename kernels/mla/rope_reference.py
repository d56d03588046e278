"""The definition of MLA's rotary embedding, its down-projection norms and the absorbed key up-projection."""

from __future__ import annotations

import torch


def mla_queries(q, cos, sin, *, up=None, positions=None, interleaved=True, compute_dtype=None):
    """See `nam56r.kernels.mla.mla_queries`. compute_dtype: None is fp32, or fp64 for fp64 inputs."""
    dtype = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    width = 2 * cos.shape[1]
    nope, rope = q.to(dtype).split((q.shape[-1] - width, width), -1)
    if up is not None:
        nope = torch.einsum("bshd,hdl->bshl", nope, up.to(dtype))
    return torch.cat((nope, _turn(rope, cos, sin, positions, interleaved)), -1).to(q.dtype).contiguous()


def mla_latents(
    q_latent, kv, cos, sin, *, q_weight=None, kv_weight=None, eps=1e-6, positions=None, interleaved=True,
    compute_dtype=None,
):  # fmt: skip
    """See `nam56r.kernels.mla.mla_latents`. compute_dtype: None is fp32, or fp64 for fp64 inputs."""
    dtype = compute_dtype or torch.promote_types(kv.dtype, torch.float32)
    width = 2 * cos.shape[1]
    latent, rope = kv.to(dtype).split((kv.shape[-1] - width, width), -1)
    rope = _turn(rope.unsqueeze(2), cos, sin, positions, interleaved).squeeze(2)
    kv_out = torch.cat((_norm(latent, kv_weight, eps), rope), -1).to(kv.dtype).contiguous()
    return q_latent if q_weight is None else _norm(q_latent.to(dtype), q_weight, eps).to(kv.dtype), kv_out


def _norm(x, weight, eps):
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def _turn(x, cos, sin, positions, interleaved):
    """x [B, S, H, Dr]; the pairs' first elements become the first half of the result, their second ones the second."""
    cos, sin = (
        (t[: x.shape[1]] if positions is None else t[positions.long()]).detach().to(x.dtype).unsqueeze(1)
        for t in (cos, sin)
    )
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
