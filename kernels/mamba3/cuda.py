"""Mamba-3's scan on the kernels of csrc/ssd: the initial state's trapezoid, and what empty sequences leave."""

from __future__ import annotations

import torch

from nam56r.kernels.mamba3.state import Mamba3State
from nam56r.kernels.ssd import cuda


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
) -> tuple[torch.Tensor, Mamba3State]:
    """See `nam56r.kernels.mamba3.mamba3_scan`."""
    state = angle = None
    if initial_state is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        initial_state = Mamba3State(*(t.to(wide) for t in initial_state))
        state, angle = entered(initial_state, dt, trap, cu_seqlens), initial_state.angle
    y, ssm, *last = cuda.scan(
        x, B, C, dt, log_decay=log_decay, trap=trap, angles=angles, B_bias=B_bias, C_bias=C_bias, D=D, z=z, mimo=mimo,
        state=state, angle=angle, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if initial_state is not None and x.shape[1] == 0:
        last = list(initial_state[1:])
    elif initial_state is not None and cu_seqlens is not None:
        empty = cu_seqlens[1:] == cu_seqlens[:-1]
        pairs = zip(initial_state[1:], last)
        last = [torch.where(empty.view(-1, *[1] * (t.ndim - 1)), kept, t) for kept, t in pairs]
    return y, Mamba3State(ssm, *last)


def entered(state: Mamba3State, dt: torch.Tensor, trap: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The state S [n, H, P, N] with what each sequence's first token adds for the token before it: (1 − λ) dt Σ_r v kᵀ."""
    if dt.shape[2] == 0:
        return state.ssm
    if cu_seqlens is None:
        dt, trap = dt[..., 0], trap[..., 0]
    else:
        first = cu_seqlens[:-1].clamp(max=dt.shape[2] - 1)  # of an empty last sequence: any
        dt, trap = (t[0].index_select(1, first).T for t in (dt, trap))
    carried = torch.sigmoid(-trap.to(state.ssm.dtype)) * dt
    if cu_seqlens is not None:
        carried = carried.where((cu_seqlens[1:] > cu_seqlens[:-1])[:, None], 0)
    return state.ssm + carried[..., None, None] * (state.v.mT @ state.k)
