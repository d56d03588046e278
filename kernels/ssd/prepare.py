"""What every token of a scan needs as numbers, in one Triton launch: decay within its chunk, weights, and the tables.

    L    [H, tokens]  Σ log_decay from its chunk's first token to it, added in float64
    W    [H, tokens]  own_t + (1 − λ_{t+1}) dt_{t+1}, what it adds to the state that later tokens read; Mamba-2: dt
    OWN  [H, tokens]  λ_t dt_t, what it adds to the state that it reads itself      (Mamba-2: W is that)
    DT   [H, tokens]  dt_t in fp32                                                  (Mamba-2: W is that)

λ = sigmoid(trap). For packed sequences also first [n + 1] and sequence_of [spans], see `sizes.Sizes`. One program is
256 tokens, whole chunks, of 8 heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nam56r.kernels.ssd.sizes import Sizes

TOKENS, HEADS = 256, 8  # of a program
COUNTS = ("sequences", "spans", "total", "search")  # arguments whose values no code depends on


@triton.jit
def sigmoid(t):
    return 1 / (1 + tl.exp(-t))


@triton.jit
def softplus(t):
    """log(1 + exp t), t itself above 20; log of the rounded sum is put right by what the rounding changed."""
    grown = tl.exp(tl.where(t > 20, 20.0, t))  # keeps NaN, as a minimum would not
    total = 1 + grown
    put_right = tl.log(total) * (grown / tl.where(total == 1, 1, total - 1))
    return tl.where(t > 20, t, tl.where(total == 1, grown, put_right))


@triton.jit
def locate(span, cu_seqlens, length, sequences, spans, total, search, SPAN: tl.constexpr):
    """Of span numbers: sequence (n where unused), its first token and its end, the span's first token, all int64."""
    if cu_seqlens is not None:
        # the last sequence with cu_seqlens[i] // SPAN + i <= span
        low = span * 0
        high = low + sequences
        left = tl.zeros([], tl.int32) + search
        while left > 0:
            left -= 1
            middle = (low + high) // 2
            here = tl.load(cu_seqlens + middle, mask=middle < sequences, other=0)
            reached = (middle < sequences) & (here // SPAN + middle <= span)
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        begin = tl.load(cu_seqlens + low)
        end = tl.load(cu_seqlens + low + 1).to(tl.int64)
        first = begin // SPAN + low
        begin = begin.to(tl.int64)
    else:
        low = span // spans
        first = low * spans
        begin = low.to(tl.int64) * length
        end = begin + length
    start = begin + (span - first).to(tl.int64) * SPAN
    used = (span < total) & (start < end)
    return tl.where(used, low, sequences), begin, tl.where(used, end, 0), start


@triton.jit
def offsets(begin, token, head, at, cu_seqlens):
    """Where token (of all) of a head lies in [B, H, S]; begin is its sequence's first token, which starts its row."""
    if cu_seqlens is not None:
        return token * at[2] + head * at[1]
    return (token - begin) * at[2] + head * at[1]


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    dt, log_decay, trap, A, bias, L, W, OWN, DT, cu_seqlens, tables,
    dt_at, decay_at, trap_at,  # strides [B, H, S]
    length, sequences, spans, total, search, heads, tokens,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = chunk // EVERY
    sequence, begin, end, start = locate(span, cu_seqlens, length, sequences, spans, total, search, CHUNK * EVERY)
    start += (chunk % EVERY) * CHUNK
    if cu_seqlens is not None:
        if tl.program_id(1) == 0:
            tl.store(tables + sequences + 1 + span, sequence.to(tl.int32), mask=(chunk % EVERY == 0) & (span < total))
            bound = tl.load(cu_seqlens + chunk, mask=chunk <= sequences)
            tl.store(tables + chunk, bound // (CHUNK * EVERY) + chunk, mask=chunk <= sequences)

    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None, None]
    token = start[None, :, None] + tl.arange(0, CHUNK)[None, None, :]
    end = end[None, :, None]
    begin = begin[None, :, None]
    row = tl.where(sequence < sequences, sequence, 0).to(tl.int64)[None, :, None]
    if cu_seqlens is not None:
        row *= 0
    inside = (token < end) & (head < heads)
    wide = W.dtype.element_ty
    at = head * tokens + token

    dt += row * dt_at[0]
    step = tl.load(dt + offsets(begin, token, head, dt_at, cu_seqlens), mask=inside, other=0.0).to(wide)
    if trap is None:
        if bias is not None:
            step += tl.load(bias + head, mask=head < heads, other=0.0).to(wide)
        if SOFTPLUS:
            step = softplus(step)
        decay = step * tl.load(A + head, mask=head < heads, other=0.0).to(wide)
        weight = step
    else:
        log_decay += row * decay_at[0]
        decay = tl.load(log_decay + offsets(begin, token, head, decay_at, cu_seqlens), mask=inside, other=0.0)
        trap += row * trap_at[0]
        mix = tl.load(trap + offsets(begin, token, head, trap_at, cu_seqlens), mask=inside, other=0.0).to(wide)
        own = sigmoid(mix) * step
        later = (token + 1 < end) & (head < heads)
        next_mix = tl.load(trap + offsets(begin, token + 1, head, trap_at, cu_seqlens), mask=later, other=0.0).to(wide)
        next_step = tl.load(dt + offsets(begin, token + 1, head, dt_at, cu_seqlens), mask=later, other=0.0).to(wide)
        weight = own + sigmoid(-next_mix) * next_step
        tl.store(OWN + at, own, mask=inside)
        tl.store(DT + at, step, mask=inside)
    decay = tl.where(inside, decay.to(tl.float64), 0.0)
    tl.store(L + at, tl.cumsum(decay, 2).to(wide), mask=inside)
    tl.store(W + at, weight, mask=inside)


def prepare(
    sizes: Sizes,
    dt: torch.Tensor,
    log_decay: torch.Tensor | None,
    trap: torch.Tensor | None,
    A: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    cu_seqlens: torch.Tensor | None,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dt, log_decay, trap [B, H, S] of any strides and float dtypes; A, dt_bias [H], Mamba-2's.

    Gives steps [4, H, tokens] (L, W, OWN, DT) or, for Mamba-2, [2, H, tokens] (L, W), in wide (fp32 or more), and the tables
    int32 [n + 1 + spans] (first, then sequence_of), or [0] where nothing is packed.
    """
    steps, tables = allocate(sizes, dt, wide)
    rows = TOKENS // sizes.chunk
    numbers = max(sizes.chunks, sizes.sequences + 1) if sizes.packed else sizes.chunks
    heads = min(HEADS, triton.next_power_of_2(sizes.heads))
    none = (0, 0, 0)
    L, W, OWN, DT = steps if sizes.model else (*steps, None, None)
    with torch.cuda.device_of(dt):
        prepare_kernel[triton.cdiv(numbers, rows), triton.cdiv(sizes.heads, heads)](
            dt, log_decay, trap, A, dt_bias, L, W, OWN, DT, cu_seqlens, tables if sizes.packed else None,
            dt.stride(), none if log_decay is None else log_decay.stride(), none if trap is None else trap.stride(),
            *numbering(sizes), sizes.heads, sizes.tokens,
            softplus, sizes.chunk, sizes.every, rows, heads, num_warps=8,
        )  # fmt: skip
    return steps, tables


def numbering(sizes: Sizes) -> tuple[int, int, int, int, int]:
    """What `locate` takes: length, sequences, spans, total, search."""
    return sizes.length, sizes.sequences, sizes.spans, sizes.total, (sizes.sequences - 1).bit_length()


def allocate(sizes: Sizes, dt: torch.Tensor, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten steps and tables."""
    steps = dt.new_empty((4 if sizes.model else 2, sizes.heads, sizes.tokens), dtype=wide)
    numbers = sizes.sequences + 1 + sizes.total if sizes.packed else 0
    return steps, dt.new_empty(numbers, dtype=torch.int32)
