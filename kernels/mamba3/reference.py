"""Mamba-3 in plain PyTorch, SISO and MIMO, chunk by chunk (arXiv 2603.15569).

With λ = sigmoid(trap), γ_t = λ_t dt_t and β_t = (1 − λ_t) dt_t α_t, step t adds γ_t v_t k_tᵀ to the state, and step
t + 1 adds β_{t+1} v_t k_tᵀ, which is (1 − λ_{t+1}) dt_{t+1} v_t k_tᵀ put there before its decay. So the trapezoid is
an ordinary scan in which a step weighs γ_t for itself and γ_t + (1 − λ_{t+1}) dt_{t+1} for all later ones.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from nam56r.kernels.mamba3.state import Mamba3State
from nam56r.kernels.scan import over_chunks, scan_chunk

ROWS = 128  # of a chunk's score matrix: steps × rank


def rotate(t: torch.Tensor, angle: torch.Tensor, *, adjacent: bool) -> torch.Tensor:
    """Turn N_a pairs of t [..., N] by angle [..., N_a]: pairs (2i, 2i + 1) if adjacent, else (i, i + N / 2)."""
    size, pairs = t.shape[-1], angle.shape[-1]
    cos, sin = angle.cos().to(t.dtype), angle.sin().to(t.dtype)
    if adjacent:
        a, b, rest = t[..., 0 : 2 * pairs : 2], t[..., 1 : 2 * pairs : 2], t[..., 2 * pairs :]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)
    a, low, b, high = t.split((pairs, size // 2 - pairs, pairs, size // 2 - pairs), dim=-1)
    return torch.cat((a * cos - b * sin, low, a * sin + b * cos, high), dim=-1)


def mamba3_scan(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    log_decay: torch.Tensor,
    trap: torch.Tensor,
    angles: torch.Tensor,
    B_bias: torch.Tensor,
    C_bias: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    initial_state: Mamba3State | None = None,
    cu_seqlens: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Mamba3State]:
    """The definition; arguments as in `nam56r.kernels.mamba3.mamba3_scan`. It reads cu_seqlens on the host.

    compute_dtype: of the products; decay, angles and state stay in fp32 or more. A chunk's inner tensors are not kept
    for the backward but computed again.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = compute_dtype or wide
    heads, headdim, (rank, groups, d_state) = *x.shape[2:], B.shape[2:]
    if initial_state is None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        shapes = (headdim, d_state), (rank, d_state), (rank, headdim), (angles.shape[-1],)
        initial_state = Mamba3State(*(x.new_zeros(rows, heads, *shape, dtype=wide) for shape in shapes))
    psi, zeta, phi = (t.to(dtype) for t in mimo) if mimo else (None, None, None)

    def by_head(t: torch.Tensor, bias: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """[B, L, R, G, N] -> [B, H, R, L, N], bias added, rotated."""
        t = t.to(dtype).permute(0, 3, 2, 1, 4).repeat_interleave(heads // groups, dim=1) + bias.to(dtype)[:, :, None]
        return rotate(t, angle[:, :, None], adjacent=mimo is None)

    def step(state, x, B, C, dt, log_decay, trap, angles, z):
        old = Mamba3State(*state)
        dt, log_decay, trap = (t.to(wide).transpose(1, 2) for t in (dt, log_decay, trap))  # [B, H, L]
        turn = math.pi * torch.tanh(angles.to(wide).transpose(1, 2)) * dt[..., None]
        angle = (old.angle[:, :, None] + turn.cumsum(2)).remainder(2 * math.pi)
        k, q = by_head(B, B_bias, angle), by_head(C, C_bias, angle)
        v = x.to(dtype).transpose(1, 2)[:, :, None]
        if mimo:
            v = v * psi[:, :, None]
        own = torch.sigmoid(trap) * dt
        carried = torch.sigmoid(-trap) * dt  # (1 − λ) dt: what each step still adds for the step before it
        ssm = old.ssm + carried[:, :, 0, None, None] * (old.v.to(dtype).mT @ old.k.to(dtype))
        y, ssm = scan_chunk(ssm, q, k, v, log_decay, own + pad(carried[..., 1:], (0, 1)), own)
        y = y + D.to(dtype)[:, None, None, None] * v
        if z is not None:
            gate = z.to(dtype).transpose(1, 2)[:, :, None]
            y = y * silu(gate * zeta[:, :, None] if mimo else gate)
        y = (y * phi[:, :, None] if mimo else y).sum(2)
        last = (k[..., -1, :].to(wide), v[..., -1, :].to(wide), angle[..., -1, :])
        return y.transpose(1, 2).to(x.dtype), (ssm, *last)

    y, final = over_chunks(
        partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False),
        tuple(t.to(wide) for t in initial_state),
        (x, B, C, dt.transpose(1, 2), log_decay.transpose(1, 2), trap.transpose(1, 2), angles, z),
        chunk=max(1, ROWS // rank),
        cu_seqlens=cu_seqlens,
    )
    return y, Mamba3State(*final)


def mamba3_step(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    log_decay: torch.Tensor,
    trap: torch.Tensor,
    angles: torch.Tensor,
    B_bias: torch.Tensor,
    C_bias: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    state: Mamba3State,
    out: Mamba3State | None = None,
) -> tuple[torch.Tensor, Mamba3State]:
    """The definition of one step; arguments as in `nam56r.kernels.mamba3.mamba3_step`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads_per_group = x.shape[1] // B.shape[2]
    psi, zeta, phi = (t.to(wide) for t in mimo) if mimo else (None, None, None)
    dt, log_decay, trap = (t.to(wide)[..., None, None] for t in (dt, log_decay, trap))  # [n, H, 1, 1]
    angle = (state.angle + math.pi * torch.tanh(angles.to(wide)) * dt[..., 0]).remainder(2 * math.pi)

    def by_head(t: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[n, R, G, N] -> [n, H, R, N], bias added, rotated."""
        t = t.to(wide).transpose(1, 2).repeat_interleave(heads_per_group, dim=1) + bias.to(wide)
        return rotate(t, angle[:, :, None], adjacent=mimo is None)

    k, q = by_head(B, B_bias), by_head(C, C_bias)
    v = x.to(wide)[:, :, None]  # [n, H, R, P]
    if mimo:
        v = v * psi
    ssm = log_decay.exp() * (state.ssm + torch.sigmoid(-trap) * dt * (state.v.mT @ state.k))
    ssm = ssm + torch.sigmoid(trap) * dt * (v.mT @ k)
    y = q @ ssm.mT + D.to(wide)[:, None, None] * v
    if z is not None:
        gate = z.to(wide)[:, :, None]
        y = y * silu(gate * zeta if mimo else gate)
    y = (y * phi if mimo else y).sum(2).to(x.dtype)
    new = Mamba3State(ssm, k, v, angle)
    return y, new if out is None else Mamba3State(*(mine.copy_(t) for mine, t in zip(out, new, strict=True)))
