"""Mamba-2 in plain PyTorch, chunk by chunk (state space duality, arXiv 2405.21060)."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import silu, softplus
from torch.utils.checkpoint import checkpoint

from nam56r.kernels.scan import over_chunks, scan_chunk

CHUNK = 64


def mamba2_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition; arguments as in `nam56r.kernels.mamba2.mamba2_scan`. It reads cu_seqlens on the host.

    compute_dtype: of the products; dt, decay and state stay in fp32 or more. A chunk's inner tensors are not kept for
    the backward but computed again.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = compute_dtype or wide
    heads, headdim, (groups, d_state) = *x.shape[2:], B.shape[2:]
    if initial_state is None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = x.new_zeros(rows, heads, headdim, d_state, dtype=wide)

    def grouped(t: torch.Tensor) -> torch.Tensor:
        """[B, L, H or G, ...] -> [B, G, heads of the group or 1, L, ...]"""
        return t.unflatten(2, (groups, -1)).movedim(1, 3)

    def step(state, x, dt, B, C, z):
        dt = dt.to(wide)
        if dt_bias is not None:
            dt = dt + dt_bias.to(wide)
        if dt_softplus:
            dt = softplus(dt)
        q, k, v = (grouped(t.to(dtype)).unsqueeze(-3) for t in (C, B, x))
        weight, log_decay = grouped(dt), grouped(dt * A.to(wide))
        y, ssm = scan_chunk(state[0].unflatten(1, (groups, -1)), q, k, v, log_decay, weight, weight)
        y = y.squeeze(-3).movedim(3, 1).flatten(2, 3)
        if D is not None:
            y = y + D.to(dtype).view(heads, -1) * x.to(dtype)
        if z is not None:
            y = y * silu(z.to(dtype))
        return y.to(x.dtype), (ssm.flatten(1, 2),)

    y, (final,) = over_chunks(
        partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False),
        (initial_state.to(wide),),
        (x, dt, B, C, z),
        chunk=CHUNK,
        cu_seqlens=cu_seqlens,
    )
    return y, final
