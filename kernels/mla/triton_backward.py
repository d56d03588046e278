"""Latent and expanded attention in Triton, backward: three kernels, no atomics, every sum in one order.

    delta_s = Σ_d dout_s (out_s + rest_s) − dlse_s                      delta_kernel: a row a head and query
    P = exp(scale q kᵀ − lse),  dS = scale P ⊙ (dout vᵀ − delta)
    dq = dS k                                                           queries_kernel: a tile of rows, over its keys
    dv = Pᵀ dout,  dk = dSᵀ q                                           keys_kernel: a block of keys, over its rows

rest is what the rounding of out to 16 bits lost: where one key has nearly all the weight, dout vᵀ and delta are nearly
equal, and out's rounding would be all of their difference.

keys_kernel, latent: a program adds up all heads of its part of the rows; dv and dk's nope part are one accumulator.
Where the features of dk and dv are too many for the registers, a program makes one half of them, from all scores.
Expanded: a program takes the EACH heads of its part one after the other, and adds up the rope part of dk over them.
With several parts the sums over heads are written in fp32, a part beside the other, and added up in their order behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nam56r.kernels.mla.triton_forward import blocks, keys, load, locate, product, queries, seen, store


@triton.jit(do_not_specialize=("S", "count"))
def delta_kernel(
    dout, dlse, out, rest, exponent, delta, dout_at, dlse_at, S, count,
    H: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta lies as exponent does."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, dv = row < count, tl.arange(0, BLOCK_DV)
    sequence, s, head = row // H // S, row // H % S, row % H
    total = tl.zeros([ROWS], tl.float32)
    if dout is not None:
        at = dout + sequence * dout_at[0] + s * dout_at[1] + head * dout_at[2]
        given = load(at, dv, dout_at[3], inside, DV, BLOCK_DV, True).to(tl.float32)
        whole = load(out + row * DV, dv, 1, inside, DV, BLOCK_DV, True).to(tl.float32)
        if rest is not None:
            whole += load(rest + row * DV, dv, 1, inside, DV, BLOCK_DV, True).to(tl.float32)
        total = tl.sum(given * whole, 1)
    if dlse is not None:
        total -= tl.load(dlse + sequence * dlse_at[0] + s * dlse_at[1] + head * dlse_at[2], mask=inside, other=0.0)
    at = ((sequence * (H // HEADS) + head // HEADS) * S + s) * HEADS + head % HEADS
    blind = tl.load(exponent + at, mask=inside, other=0.0) == -float("inf")
    tl.store(delta + at, tl.where(blind, 0.0, total), mask=inside)


@triton.jit
def descend(
    state, start, first, end, q_nope, q_rope, given, exponent, delta, k_nope, k_rope, v, n_at, r_at, v_at, T, factor,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, LATENT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a key block's part to state: (dq's nope, rope), without the factor scale."""
    d_nope, d_rope = state
    t = start + tl.arange(0, COLUMNS)
    nope, rope, value = keys(
        t, T, k_nope, k_rope, v, n_at, r_at, v_at, DN, DR, DV, LATENT, BLOCK_DN, BLOCK_DR, BLOCK_DV, MASKED
    )
    weight = tl.exp2(product(q_nope, q_rope, nope, rope, DR) * factor - exponent[:, None])
    if MASKED:
        visible = (t[None, :] >= first[:, None]) & (t[None, :] < end[:, None])
        weight = tl.where(visible, weight, 0.0)
    of_weight = tl.dot(given, tl.trans(value), input_precision="ieee")
    of_score = (weight * (of_weight - delta[:, None])).to(nope.dtype)
    d_nope = tl.dot(of_score, nope, d_nope, input_precision="ieee")
    if DR:
        d_rope = tl.dot(of_score, rope, d_rope, input_precision="ieee")
    return d_nope, d_rope


@triton.jit(do_not_specialize=("S", "T", "offset"))
def queries_kernel(
    q, k_nope, k_rope, v, dout, exponent, delta, dq, bounds,
    q_at, n_at, r_at, v_at, dout_at,  # strides
    S, T, offset, scale, factor,  # factor: scale · log₂ e
    H: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    sequence, group, row, s, head, inside, first, end, low, inner_low, inner_high, high = locate(
        tl.program_id(0), S, T, bounds, offset, H, HEADS, CAUSAL, ROWS
    )
    dn, dr, dv = tl.arange(0, BLOCK_DN), tl.arange(0, BLOCK_DR), tl.arange(0, BLOCK_DV)
    q_nope, q_rope = queries(q, q_at, sequence, s, head, inside, DN, DR, BLOCK_DN, BLOCK_DR)
    at = dout + sequence * dout_at[0] + s.to(tl.int64) * dout_at[1] + head.to(tl.int64) * dout_at[2]
    given = load(at, dv, dout_at[3], inside, DV, BLOCK_DV, True)
    at = (sequence * (H // HEADS) + group) * S * HEADS + row
    of_row = tl.load(exponent + at, mask=inside, other=0.0)
    subtract = tl.load(delta + at, mask=inside, other=0.0)
    k_nope += sequence * n_at[0] + group.to(tl.int64) * n_at[2]
    k_rope += sequence * r_at[0]
    v += sequence * v_at[0] + group.to(tl.int64) * v_at[2]
    state = tl.zeros([ROWS, BLOCK_DN], tl.float32), tl.zeros([ROWS, BLOCK_DR], tl.float32)
    low = low // COLUMNS * COLUMNS
    count, edge, whole = blocks(low, inner_low, inner_high, high, COLUMNS)
    for i in range(count - whole):
        start = low + tl.where(i < edge, i, i + whole) * COLUMNS
        state = descend(
            state, start, first, end, q_nope, q_rope, given, of_row, subtract, k_nope, k_rope, v, n_at, r_at, v_at, T,
            factor, DN, DR, DV, LATENT, COLUMNS, BLOCK_DN, BLOCK_DR, BLOCK_DV, True,
        )  # fmt: skip
    for i in range(edge, edge + whole):
        start = low + i * COLUMNS
        state = descend(
            state, start, first, end, q_nope, q_rope, given, of_row, subtract, k_nope, k_rope, v, n_at, r_at, v_at, T,
            factor, DN, DR, DV, LATENT, COLUMNS, BLOCK_DN, BLOCK_DR, BLOCK_DV, False,
        )  # fmt: skip
    d_nope, d_rope = state
    at = dq + ((sequence * S + s) * H + head) * (DN + DR)
    store(at, dn, d_nope * scale, inside, DN)
    if DR:
        store(at + DN, dr, d_rope * scale, inside, DR)


@triton.jit
def collect(
    state, start, rows, half, t, nope, nope_other, rope, value, value_other, q, dout, exponent, delta, bounds, q_at,
    dout_at, S, T, offset, scale, factor,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr, BLOCK_DV: tl.constexpr,
    HALVES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a block of rows' part to state: the gradients of (nope, rope, value), this half's, of the keys t."""
    d_nope, d_rope, d_value = state
    dn, dv = half * BLOCK_DN + tl.arange(0, BLOCK_DN), half * BLOCK_DV + tl.arange(0, BLOCK_DV)
    dr = tl.arange(0, BLOCK_DR)
    row = start + tl.arange(0, ROWS)
    inside = row < rows
    if MASKED:
        row = tl.minimum(row, rows - 1)
    s = row // HEADS
    head, wide = (row % HEADS).to(tl.int64), s.to(tl.int64)
    at = q + wide * q_at[1] + head * q_at[2]
    q_nope = load(at, dn, q_at[3], inside, DN, HALVES * BLOCK_DN, MASKED)
    q_rope = q_nope
    if DR:
        q_rope = load(at + DN * q_at[3], dr, q_at[3], inside, DR, BLOCK_DR, MASKED)
    score = product(nope, rope, q_nope, q_rope, DR)
    if HALVES == 2:
        other = load(at, dn + (1 - 2 * half) * BLOCK_DN, q_at[3], inside, DN, 2 * BLOCK_DN, MASKED)
        score = tl.dot(nope_other, tl.trans(other), score, input_precision="ieee")
    at = dout + wide * dout_at[1] + head * dout_at[2]
    given = load(at, dv, dout_at[3], inside, DV, HALVES * BLOCK_DV, MASKED)
    of_weight = tl.dot(value, tl.trans(given), input_precision="ieee")
    if HALVES == 2:
        other = load(at, dv + (1 - 2 * half) * BLOCK_DV, dout_at[3], inside, DV, 2 * BLOCK_DV, MASKED)
        of_weight = tl.dot(value_other, tl.trans(other), of_weight, input_precision="ieee")
    weight = tl.exp2(score * factor - tl.load(exponent + row)[None, :])
    if MASKED:
        first, end = seen(s, bounds, S, T, offset, CAUSAL)
        visible = (t[:, None] >= first[None, :]) & (t[:, None] < end[None, :]) & inside[None, :]
        weight = tl.where(visible, weight, 0.0)
    of_score = (weight * (of_weight - tl.load(delta + row)[None, :]) * scale).to(nope.dtype)
    weight = weight.to(nope.dtype)
    if DR:
        d_rope = tl.dot(of_score, q_rope, d_rope, input_precision="ieee")
    d_nope = tl.dot(of_score, q_nope, d_nope, input_precision="ieee")
    if LATENT:
        d_nope = tl.dot(weight, given, d_nope, input_precision="ieee")
    else:
        d_value = tl.dot(weight, given, d_value, input_precision="ieee")
    return d_nope, d_rope, d_value


@triton.jit
def before(count, part, parts):
    """How many of count blocks belong to the parts before this one."""
    return (count.to(tl.int64) * part // parts).to(tl.int32)


@triton.jit(do_not_specialize=("S", "T", "offset", "batch"))
def keys_kernel(
    q, k_nope, k_rope, v, dout, exponent, delta, dk_nope, dk_rope, dv, bounds,
    q_at, n_at, r_at, v_at, dout_at,  # strides
    S, T, offset, scale, factor, batch, parts, each,  # factor: scale · log₂ e
    H: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    half, program = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES
    columns = tl.cdiv(T, COLUMNS)
    start = program % columns * COLUMNS
    part = program // columns % parts
    sequence = (program // columns // parts).to(tl.int64)
    t = start + tl.arange(0, COLUMNS)
    inside = t < T
    last = tl.minimum(start + COLUMNS, T) - 1
    # the queries that see any of the keys, and within them those that see all
    if bounds is not None:
        low, inner_high = tl.load(bounds + start), tl.load(bounds + S + start)
        inner_low, high = tl.load(bounds + last), tl.load(bounds + S + last)
        if CAUSAL:
            low, inner_low = start, last
    else:
        low, inner_low, inner_high, high = start * 0, start * 0, S, S
        if CAUSAL:
            low, inner_low = tl.maximum(start - offset, 0), tl.maximum(last - offset, 0)
    rows, low = S * HEADS, low * HEADS
    count, edge, whole = blocks(low, inner_low * HEADS, inner_high * HEADS, high * HEADS, ROWS)
    edges = count - whole
    edge_from, edge_to, whole_from, whole_to = start * 0, edges, start * 0, whole
    if LATENT:  # this part's blocks
        edge_from, edge_to = before(edges, part, parts), before(edges, part + 1, parts)
        whole_from, whole_to = before(whole, part, parts), before(whole, part + 1, parts)

    dn, of_v = half * BLOCK_DN + tl.arange(0, BLOCK_DN), half * BLOCK_DV + tl.arange(0, BLOCK_DV)
    dr = tl.arange(0, BLOCK_DR)
    row = t.to(tl.int64)
    k_nope += sequence * n_at[0]
    v += sequence * v_at[0]
    rope = tl.zeros([COLUMNS, BLOCK_DR], q.dtype.element_ty)
    if DR:
        rope = load(k_rope + sequence * r_at[0] + row * r_at[1], dr, r_at[2], inside, DR, BLOCK_DR, True)
    d_nope, d_rope = tl.zeros([COLUMNS, BLOCK_DN], tl.float32), tl.zeros([COLUMNS, BLOCK_DR], tl.float32)
    first_head = start * 0 if LATENT else part * each
    for group in range(first_head, first_head + each):
        head = tl.full([], 0, tl.int64) + group
        at = k_nope + head * n_at[2] + row * n_at[1]
        nope = load(at, dn, n_at[3], inside, DN, BLOCK_DN, True)
        nope_other, value, value_other = nope, nope, nope
        if HALVES == 2:
            nope_other = load(at, dn + (1 - 2 * half) * BLOCK_DN, n_at[3], inside, DN, BLOCK_DN, True)
            value_other = nope_other
        if not LATENT:
            at = v + head * v_at[2] + row * v_at[1]
            value = load(at, of_v, v_at[3], inside, DV, BLOCK_DV, True)
            if HALVES == 2:
                value_other = load(at, of_v + (1 - 2 * half) * BLOCK_DV, v_at[3], inside, DV, BLOCK_DV, True)
        q_head = q + sequence * q_at[0] + head * q_at[2]
        dout_head = dout + sequence * dout_at[0] + head * dout_at[2]
        of_rows = (sequence * (H // HEADS) + head) * rows
        d_nope = tl.zeros([COLUMNS, BLOCK_DN], tl.float32)
        state = d_nope, d_rope, tl.zeros([COLUMNS, 16 if LATENT else BLOCK_DV], tl.float32)
        for i in range(edge_from, edge_to):
            state = collect(
                state, low + tl.where(i < edge, i, i + whole) * ROWS, rows, half, t, nope, nope_other, rope, value,
                value_other, q_head, dout_head, exponent + of_rows, delta + of_rows, bounds, q_at, dout_at,
                S, T, offset, scale, factor,
                DN, DR, DV, HEADS, LATENT, CAUSAL, ROWS, BLOCK_DN, BLOCK_DR, BLOCK_DV, HALVES, True,
            )  # fmt: skip
        for i in range(whole_from, whole_to):
            state = collect(
                state, low + (edge + i) * ROWS, rows, half, t, nope, nope_other, rope, value,
                value_other, q_head, dout_head, exponent + of_rows, delta + of_rows, bounds, q_at, dout_at,
                S, T, offset, scale, factor,
                DN, DR, DV, HEADS, LATENT, CAUSAL, ROWS, BLOCK_DN, BLOCK_DR, BLOCK_DV, HALVES, False,
            )  # fmt: skip
        d_nope, d_rope, d_value = state
        if not LATENT:
            at = (sequence * T + t) * H + head
            store(dk_nope + at * DN, dn, d_nope, inside, DN)
            store(dv + at * DV, of_v, d_value, inside, DV)
    at = (part * batch.to(tl.int64) + sequence) * T + t
    inside_rope = inside & (half == 0)
    if LATENT:  # dk_rope lies behind dk_nope in the same rows
        store(dk_nope + at * (DN + DR), dn, d_nope, inside, DN)
        if DR:
            store(dk_nope + at * (DN + DR) + DN, dr, d_rope, inside_rope, DR)
    elif DR:
        store(dk_rope + at * DR, dr, d_rope, inside_rope, DR)
