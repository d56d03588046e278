"""Chunked form of the linear recurrences S_t = a_t S_{t-1} + w_t v_t k_tᵀ, y_t = S_t q_t (Mamba-2, Mamba-3).

Inside a chunk the recurrence is a masked matrix product (state space duality, Dao and Gu, arXiv 2405.21060);
between chunks only the state is carried. `over_chunks` walks any recurrence over the chunks of its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, repeat

import torch

State = tuple[torch.Tensor, ...]


def over_chunks(
    step: Callable[..., tuple[torch.Tensor, State]],
    state: State,
    inputs: tuple[torch.Tensor | None, ...],
    *,
    chunk: int,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """Run step(state, *pieces) -> (y, state) over the chunks of every sequence.

    inputs have the sequence in dimension 1; y is shaped like the first of them. state has one row a batch row or,
    when packed, one a sequence (B = 1). cu_seqlens is read on the host. Gives (y, the final states).
    """
    ends = [0, inputs[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [[min(chunk, end - at) for at in range(start, end, chunk)] for start, end in pairwise(ends)]
    sizes = [size for row in lengths for size in row]
    # one split each: its backward is one concatenation, where slices would each fill a whole gradient
    pieces = zip(*(repeat(None) if t is None else t.split(sizes, dim=1) for t in inputs))
    outputs, finals = [inputs[0][:, :0]], [tuple(t[:0] for t in state)]
    for n, row in enumerate(lengths):
        current = state if cu_seqlens is None else tuple(t[n : n + 1] for t in state)
        for _ in row:
            y, current = step(current, *next(pieces))
            outputs.append(y)
        finals.append(current)
    return torch.cat(outputs, dim=1), tuple(torch.cat(parts) for parts in zip(*finals))


def scan_chunk(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    own_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of S_t = exp(log_decay_t) S_{t-1} + weight_t Σ_r v_{t,r} k_{t,r}ᵀ, read as y_{t,r} = S_t q_{t,r}.

    state [..., P, N]; q, k [..., R, L, N]; v, y [..., R, L, P]; log_decay, weight, own_weight [..., L]. The leading
    dimensions broadcast. own_weight stands for weight_t in y_t itself: what step t adds before step t + 1 adds more
    to it. Decay and state keep their dtype (fp32 or more); products are taken in q's dtype.
    Gives (y, the state after the chunk).
    """
    rank, length = q.shape[-3:-1]
    dtype = q.dtype
    q, k, v = (t.flatten(-3, -2) for t in (q, k, v))
    # float64: differences of long sums of large decays would lose fp32's digits
    total = log_decay.double().cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).to(state.dtype)  # [..., t, i]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    mix = between.masked_fill(later, -torch.inf).exp() * weight[..., None, :]
    mix = torch.diagonal_scatter(mix, own_weight, dim1=-2, dim2=-1).to(dtype)
    scores = (q @ k.mT).unflatten(-1, (rank, length)).unflatten(-3, (rank, length)) * mix[..., None, :, None, :]
    from_start = total.to(state.dtype).exp()[..., None]
    to_end = ((total[..., -1:] - total).to(state.dtype).exp() * weight)[..., None]

    def every_rank(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype).repeat(*[1] * (t.ndim - 2), rank, 1)

    y = scores.flatten(-2).flatten(-3, -2) @ v + (q @ state.to(dtype).mT) * every_rank(from_start)
    state = from_start[..., -1:, :] * state + (v * every_rank(to_end)).mT @ k
    return y.unflatten(-2, (rank, length)), state
