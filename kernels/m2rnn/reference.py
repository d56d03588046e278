"""M²RNN in plain PyTorch: the recurrence of arXiv 2603.14360, and its backward by the same paper's formulas.

The backward is written out because autograd would keep several states a step: here a chunk keeps only its inputs and
the state it starts from, and its states are computed again.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nam56r.kernels.scan import over_chunks

CHUNK = 64


def m2rnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    forget: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition; arguments as in `nam56r.kernels.m2rnn.m2rnn`. It reads cu_seqlens on the host.

    compute_dtype: of the products and the tanh; the state stays in fp32 or more.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    dtype = compute_dtype or wide
    heads = v.shape[2]
    if initial_state is None:
        rows = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = v.new_zeros(rows, heads, q.shape[-1], v.shape[-1], dtype=wide)
    weight = weight.to(dtype)

    def lead(t: torch.Tensor) -> torch.Tensor:
        """[B, L, H or fewer, ...] -> [L, H, B, ...]: batch rows share a head's W, so they are rows of one product."""
        return t.repeat_interleave(heads // t.shape[2], dim=2).movedim(0, 2).contiguous()

    def step(state, v, q, k, forget):
        operands = (lead(t).to(dtype) for t in (q, k, v))
        y, h = _Chunk.apply(state[0].transpose(0, 1).contiguous(), *operands, weight, lead(forget).to(wide))
        return y.movedim(2, 0).to(v.dtype), (h.transpose(0, 1),)

    y, (final,) = over_chunks(step, (initial_state.to(wide),), (v, q, k, forget), chunk=CHUNK, cu_seqlens=cu_seqlens)
    return y, final


def _recur(h, k, v, weight, forget):
    """States H_0 … H_L [L + 1, H, B, K, V] and Z_1 … Z_L of a chunk."""
    states = torch.cat((h[None], h.new_empty(len(k), *h.shape)))
    z = k[..., :, None] * v[..., None, :]
    for row, f, old, new in zip(z, forget[..., None, None], states, states[1:]):
        row.flatten(1, 2).baddbmm_(old.to(z.dtype).flatten(1, 2), weight).tanh_()
        torch.lerp(row.to(h.dtype), old, f, out=new)
    return states, z


class _Chunk(torch.autograd.Function):
    """h [H, B, K, V]; q, k [L, H, B, K]; v, y [L, H, B, V]; weight [H, V, V]; forget [L, H, B] -> (y, the last state)."""

    @staticmethod
    def forward(ctx, h, q, k, v, weight, forget):
        ctx.save_for_backward(h, q, k, v, weight, forget)
        states, _ = _recur(h, k, v, weight, forget)
        return (q[..., None] * states[1:].to(q.dtype)).sum(-2), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, q, k, v, weight, forget = ctx.saved_tensors
        states, z = _recur(h, k, v, weight, forget)
        before, fade = states[:-1], forget[..., None, None]
        g = (q[..., :, None] * dy[..., None, :]).to(h.dtype)
        p = ((1 - fade) * (1 - z * z)).to(q.dtype)
        for g_t, p_t, f in zip(*(reversed(t.unbind()) for t in (g, p, fade))):
            g_t += dh
            p_t *= g_t
            dh = torch.addcmul((p_t.flatten(1, 2) @ weight.mT).view(h.shape).to(h.dtype), f, g_t)
        return (
            dh,
            (states[1:].to(q.dtype) * dy[..., None, :]).sum(-1),
            (p * v[..., None, :]).sum(-1),
            (p * k[..., :, None]).sum(-2),
            torch.einsum("lhbkv,lhbkw->hvw", before.to(p.dtype), p),
            (g * (before - z)).sum((-2, -1)),
        )
