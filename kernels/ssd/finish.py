"""Behind the backward's CUDA kernels: from their partial gradients to those of dt, log_decay, trap and the angles.

Three Triton launches, one for Mamba-2; u is a head's unit, sums over its units are meant where a head is named.

1. carry    per sequence and head: what the angles of chunk j still turn later, carry_j = dangle_final + Σ of total over
            the later chunks. With all chunks it is the initial angle's gradient.
2. decays   dlog_decay_t = energy + Σ_{t' >= t} READ_t' + Σ_{t' < t} (W_t' DW_t' − PAIRS_t') over the chunk's tokens: what
            passes all of it; what t and later tokens read of the state before it; what earlier ones wrote for these and
            for the state behind it. All this has been through t's decay; what cancels in the last sum are pairs of
            earlier tokens of the chunk, which are in DW and in PAIRS.
            With dγ = DOWN + DW and dc_t = DW_{t-1} (0 at a sequence's start):
            ddt = λ dγ + (1 − λ) dc, dtrap = λ (1 − λ) dt (dγ − dc). Mamba-2: ddt = dγ + A dlog_decay, then what is
            before it: dA, softplus, dt_bias.
3. angles   ddt_t += ddt_turned + π Σ_i tanh(a_i) carry_i
            dangle_{t,i} = π (1 − tanh²) (dangle_sum + Σ_h dt_{t,h} carry_{h,i})
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nam56r.kernels.ssd.prepare import COUNTS, locate, numbering, offsets, sigmoid
from nam56r.kernels.ssd.sizes import Sizes

PI = tl.constexpr(3.141592653589793)
TOKENS, HEADS = 256, 8  # of a program of `decays`
CHUNKS = 64  # that `carry` loads at once
ROWS, TURNED = 16, 2048  # tokens of a program of `angles`, and what it adds up at once,
SHARED = 32  # or heads, where they share the angles: sums over heads and over pairs are products
LEAST = 16  # that a product sums over


@triton.jit(do_not_specialize=("length", "spans"))
def carry_kernel(
    totals, dfinal, carry, dinitial, cu_seqlens, tables, length, spans, heads, pairs,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, CHUNKS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    first = sequence * spans
    if cu_seqlens is not None:
        length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
        first = tl.load(tables + sequence)
    first = first.to(tl.int64) * EVERY
    chunks = (length + CHUNK - 1) // CHUNK
    pair = tl.arange(0, PAIRS)
    of_head = (sequence * heads + head) * pairs + pair
    later = tl.zeros([PAIRS], carry.dtype.element_ty)
    if dfinal is not None:
        later = tl.load(dfinal + of_head, mask=pair < pairs, other=0.0)
    at_chunk = tl.zeros([], tl.int32) + (chunks + CHUNKS - 1) // CHUNKS * CHUNKS
    while at_chunk > 0:
        at_chunk -= CHUNKS
        chunk = at_chunk + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (pair < pairs)[None, :]
        row = (first + chunk)[:, None] * heads + head
        turned = tl.zeros([CHUNKS, PAIRS], carry.dtype.element_ty)
        for part in tl.static_range(BLOCKS):
            at = (row * BLOCKS + part) * pairs + pair[None, :]
            turned += tl.load(totals + at, mask=inside, other=0.0)
        reached = tl.cumsum(turned, 0, reverse=True) + later[None, :]
        tl.store(carry + row * pairs + pair[None, :], reached - turned, mask=inside)
        later += tl.sum(turned, 0)
    if dinitial is not None:
        tl.store(dinitial + of_head, later, mask=pair < pairs)


@triton.jit(do_not_specialize=COUNTS)
def decays_kernel(
    energy, reads, pairs, writes, down, dw, W, DT, dt, trap, A, bias, cu_seqlens,
    ddt, dlog_decay, dtrap, sums,
    dt_at, trap_at, ddt_at, ddecay_at, dtrap_at,  # strides [B, H, S]
    length, sequences, spans, total, search, heads, tokens,
    SOFTPLUS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = chunk // EVERY
    sequence, begin, end, start = locate(span, cu_seqlens, length, sequences, spans, total, search, CHUNK * EVERY)
    start += (chunk % EVERY) * CHUNK
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None, None]
    wide = W.dtype.element_ty
    token = start[None, :, None] + tl.arange(0, CHUNK)[None, None, :]
    end = end[None, :, None]
    begin = begin[None, :, None]
    row = tl.where(sequence < sequences, sequence, 0).to(tl.int64)[None, :, None]
    if cu_seqlens is not None:
        row *= 0
    inside = (token < end) & (head < heads)
    read = tl.zeros([HEADS, ROWS, CHUNK], wide)
    own, later, before, paired, left = read, read, read, read, read
    passing = tl.zeros([HEADS, ROWS, 1], wide)
    used = (start[None, :, None] < end) & (head < heads)
    for part in tl.static_range(BLOCKS):
        at = (chunk.to(tl.int64)[None, :, None] * heads + head) * BLOCKS + part
        passing += tl.load(energy + at, mask=used, other=0.0)
        at = (head * BLOCKS + part) * tokens + token
        read += tl.load(reads + at, mask=inside, other=0.0)
        paired += tl.load(pairs + at, mask=inside, other=0.0)
        left += tl.load(writes + at, mask=inside, other=0.0)
        own += tl.load(down + at, mask=inside, other=0.0)
        later += tl.load(dw + at, mask=inside, other=0.0)
        if trap is not None:
            before += tl.load(dw + at - 1, mask=inside & (token > begin), other=0.0)
    weight = tl.load(W + head * tokens + token, mask=inside, other=0.0)
    passed = weight * later - paired
    decayed = passing + tl.cumsum(read, 2, reverse=True) + (tl.cumsum(passed, 2) - passed)
    # exactly 0 where nothing from t on is read, though the sum's rounding is not
    behind = tl.cumsum(tl.abs(read) + tl.abs(own), 2, reverse=True) + tl.abs(passing)
    behind += tl.sum(tl.abs(left), 2, keep_dims=True)
    decayed = tl.where(behind == 0, 0.0, decayed)
    own += later
    if trap is None:
        weight_A = tl.load(A + head, mask=head < heads, other=0.0)
        gradient = own + weight_A * decayed
        decayed = tl.where(inside, decayed * weight, 0.0)
        of_program = tl.program_id(0) * heads + head
        both = tl.reshape(tl.sum(tl.sum(decayed, 2), 1), [HEADS, 1, 1])
        tl.store(sums + of_program, both, mask=head < heads)
        if SOFTPLUS:
            dt += row * dt_at[0]
            raw = tl.load(dt + offsets(begin, token, head, dt_at, cu_seqlens), mask=inside, other=0.0).to(wide)
            if bias is not None:
                raw += tl.load(bias + head, mask=head < heads, other=0.0).to(wide)
            gradient *= sigmoid(raw)
        gradient = tl.where(inside, gradient, 0.0)
        both = tl.reshape(tl.sum(tl.sum(gradient, 2), 1), [HEADS, 1, 1])
        tl.store(sums + tl.num_programs(0) * heads + of_program, both, mask=head < heads)
    else:
        trap += row * trap_at[0]
        mix = tl.load(trap + offsets(begin, token, head, trap_at, cu_seqlens), mask=inside, other=0.0).to(wide)
        duration = tl.load(DT + head * tokens + token, mask=inside, other=0.0)
        keep, pass_on = sigmoid(mix), sigmoid(-mix)
        gradient = keep * own + pass_on * before
        dmix = keep * pass_on * duration * (own - before)
        dtrap += row * dtrap_at[0]
        dmix = dmix.to(dtrap.dtype.element_ty)
        tl.store(dtrap + offsets(begin, token, head, dtrap_at, cu_seqlens), dmix, mask=inside)
        dlog_decay += row * ddecay_at[0]
        tl.store(dlog_decay + offsets(begin, token, head, ddecay_at, cu_seqlens), decayed, mask=inside)
    ddt += row * ddt_at[0]
    tl.store(ddt + offsets(begin, token, head, ddt_at, cu_seqlens), gradient.to(ddt.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def angles_kernel(
    ddt_turned, dangle_sum, carry, DT, angles, cu_seqlens, sofar, ddt, dangle,
    angles_at, dangle_at, sofar_at, ddt_at,  # strides [B, S, H, NA], the last 1, and twice [B, H, S]
    length, sequences, spans, total, search, tokens, pairs,
    heads: tl.constexpr, sums: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    EVERY: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = CHUNK // ROWS
    chunk = tl.program_id(0) // parts
    span = chunk // EVERY
    sequence, begin, end, start = locate(span, cu_seqlens, length, sequences, spans, total, search, CHUNK * EVERY)
    if sequence == sequences:
        return
    row = sequence.to(tl.int64)
    if cu_seqlens is not None:
        row *= 0
    token = start + (chunk % EVERY) * CHUNK + (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    live = token < end
    both = live[:, None] & (pair < pairs)[None, :]
    position = (token - begin)[:, None] if cu_seqlens is None else token[:, None]
    angles += row * angles_at[0]
    dangle += row * dangle_at[0]
    sofar += row * sofar_at[0]
    ddt += row * ddt_at[0]
    at_angle = position * angles_at[1] + pair[None, :]
    at_dangle = position * dangle_at[1] + pair[None, :]
    if SHARED:
        bent = tl.load(angles + at_angle, mask=both, other=0.0)
        turned = tl.zeros([ROWS, PAIRS], DT.dtype.element_ty)
        for block in range(sums):
            at = (tl.full([], block, tl.int64) * tokens + token)[:, None] * pairs + pair[None, :]
            turned += tl.load(dangle_sum + at, mask=both, other=0.0)
    for block in range((heads + HEADS - 1) // HEADS):
        head = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        inside = (head < heads)[:, None] & live[None, :]
        at = (chunk.to(tl.int64) * heads + head)[:, None] * pairs + pair[None, :]
        of_head = (head < heads)[:, None] & (pair < pairs)[None, :]
        later = tl.load(carry + at, mask=of_head, other=0.0)
        at = head[:, None] * tokens + token[None, :]
        duration = tl.load(DT + at, mask=inside, other=0.0)
        if SHARED:
            turned += tl.dot(tl.trans(duration), later, input_precision="ieee")
            turning = tl.dot(later, tl.trans(bent), input_precision="ieee")
        else:
            each = inside[:, :, None] & (pair < pairs)[None, None, :]
            at = at_angle[None, :, :] + head[:, None, None] * angles_at[2]
            bent = tl.load(angles + at, mask=each, other=0.0)
            turning = tl.sum(bent * later[:, None, :], 2)
            turned = duration[:, :, None] * later[:, None, :]
            for part in tl.static_range(BLOCKS):
                at = (head[:, None] * BLOCKS + part) * tokens + token[None, :]
                at = at[:, :, None] * pairs + pair[None, None, :]
                turned += tl.load(dangle_sum + at, mask=each, other=0.0)
            turned *= PI * (1 - bent * bent)
            at = at_dangle[None, :, :] + head[:, None, None] * dangle_at[2]
            tl.store(dangle + at, turned, mask=each)
        at = offsets(begin, token[None, :], head[:, None], sofar_at, cu_seqlens)
        gradient = tl.load(sofar + at, mask=inside, other=0.0) + PI * turning
        for part in tl.static_range(BLOCKS):
            at = (head[:, None] * BLOCKS + part) * tokens + token[None, :]
            gradient += tl.load(ddt_turned + at, mask=inside, other=0.0)
        at = offsets(begin, token[None, :], head[:, None], ddt_at, cu_seqlens)
        tl.store(ddt + at, gradient.to(ddt.dtype.element_ty), mask=inside)
    if SHARED:
        tl.store(dangle + at_dangle, turned * PI * (1 - bent * bent), mask=both)


def finish(
    sizes: Sizes,
    partial: dict[str, torch.Tensor],
    steps: torch.Tensor,
    tables: torch.Tensor,
    dt: torch.Tensor,
    trap: torch.Tensor | None,
    angles: torch.Tensor | None,
    A: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    cu_seqlens: torch.Tensor | None,
    dfinal_angle: torch.Tensor | None,
    initial_angle: bool,
) -> tuple[torch.Tensor, ...]:
    """partial: what the CUDA kernels wrote, by their fields' names; angles: tanh of them.

    Gives the gradients of dt, log_decay, trap (in their layouts, log_decay's in dt's and wide), of the angles, A, dt_bias
    and the initial angle, each None where the model has none (the last also without `initial_angle`).
    """
    heads = min(HEADS, triton.next_power_of_2(sizes.heads))
    rows, none = TOKENS // sizes.chunk, (0, 0, 0)
    wide, numbers = steps.dtype, numbering(sizes)
    programs = triton.cdiv(sizes.chunks, rows)
    ddt = torch.empty_like(dt)
    # not ddt: threads that hold the same element would add to it twice
    sofar = torch.empty_like(dt, dtype=wide) if sizes.model else ddt
    W, DT = steps[1], steps[3] if sizes.model else None
    dlog_decay = dtrap = sums = dangle = dinitial = None
    if sizes.model:
        dlog_decay, dtrap = torch.empty_like(dt, dtype=wide), torch.empty_like(trap)
    else:
        sums = steps.new_empty(2, programs, sizes.heads)
    with torch.cuda.device_of(dt):
        decays_kernel[programs, triton.cdiv(sizes.heads, heads)](
            *(partial[name] for name in ("energy", "READ", "PAIRS", "WRITE", "DOWN", "DW")), W, DT, dt, trap, A,
            dt_bias, cu_seqlens, sofar, dlog_decay, dtrap, sums,
            dt.stride(), trap.stride() if sizes.model else none, sofar.stride(),
            dlog_decay.stride() if sizes.model else none, dtrap.stride() if sizes.model else none,
            *numbers, sizes.heads, sizes.tokens,
            softplus, sizes.blocks, sizes.chunk, sizes.every, rows, heads, num_warps=8,
        )  # fmt: skip
        if not sizes.model:
            return ddt, None, None, None, sums[0].sum(0), None if dt_bias is None else sums[1].sum(0), None
        carry = steps.new_empty(sizes.chunks, sizes.heads, sizes.pairs)
        if initial_angle:
            dinitial = steps.new_empty(sizes.sequences, sizes.heads, sizes.pairs)
        pairs = triton.next_power_of_2(sizes.pairs)
        carry_kernel[sizes.heads, sizes.sequences](
            partial["total"], dfinal_angle, carry, dinitial, cu_seqlens,
            tables if sizes.packed else None, sizes.length, sizes.spans, sizes.heads, sizes.pairs,
            sizes.blocks, sizes.chunk, sizes.every, CHUNKS, pairs, num_warps=4,
        )  # fmt: skip
        rows = min(ROWS, sizes.chunk)
        if sizes.angle_heads == 1:
            pairs, heads = max(LEAST, pairs), max(LEAST, min(SHARED, triton.next_power_of_2(sizes.heads)))
        else:
            heads = min(heads, TURNED // (rows * pairs))
        dangle = torch.empty_like(angles, memory_format=torch.contiguous_format)
        angles_kernel[(sizes.chunks * (sizes.chunk // rows),)](
            partial["ddt_turned"], partial["dangle_sum"], carry, DT, angles, cu_seqlens, sofar, ddt, dangle,
            angles.stride(), dangle.stride(), sofar.stride(), ddt.stride(),
            *numbers, sizes.tokens, sizes.pairs,
            sizes.heads, sizes.angle_rows, sizes.angle_heads == 1, sizes.blocks, sizes.chunk, sizes.every, rows, heads,
            pairs, num_warps=4,
        )  # fmt: skip
    return ddt, dlog_decay, dtrap, dangle, None, None, dinitial
