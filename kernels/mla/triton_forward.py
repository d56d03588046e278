"""Latent and expanded attention in Triton, forward: what all kernels share, and out, lse and, for the backward,
exponent: lse in base 2, not rounded twice, [B, H / HEADS, S, HEADS], in which a tile's rows lie side by side.

A tile's rows are queries of one head (expanded), or pairs (query, head), heads fastest (latent: HEADS = H), so that a
key block is fetched once for a tile's heads. A key is [nope | rope], two products into one score; in latent form the
value is the nope part, there already. Feature dims are padded to powers of two with zeros that are not read.

A query sees the keys from `first` to before `end`, both rising with the query. So a tile's keys are one range, and all
but the blocks at its two ends are seen whole: these are the second loop, without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def seen(s, bounds, S, T, offset, CAUSAL: tl.constexpr):
    """The keys that query s (a scalar or a block) sees: the first, and the end behind the last."""
    if bounds is not None:
        first, end = tl.load(bounds + s), tl.load(bounds + S + s)
        if CAUSAL:
            end = s + 1
    else:
        first, end = s * 0, s * 0 + T
        if CAUSAL:
            end = tl.minimum(tl.maximum(s + offset + 1, 0), T)
    return first, end


@triton.jit
def blocks(low, inner_low, inner_high, high, BLOCK: tl.constexpr):
    """Blocks from low to high: how many, how many of them begin before inner_low, and how many behind those are whole
    within inner_low and inner_high."""
    count = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    head = tl.minimum(tl.cdiv(tl.maximum(inner_low - low, 0), BLOCK), count)
    whole = tl.minimum(tl.maximum(inner_high - low, 0) // BLOCK, count) - head
    return count, head, tl.maximum(whole, 0)


@triton.jit
def load(rows, d, d_at, inside, D: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """The features d of rows (pointers [n]): zeros behind D, PADDED to that, and, with MASKED, where not inside [n]."""
    at = rows[:, None] + (d * d_at)[None, :]
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if D != PADDED:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store(rows, d, value, inside, D: tl.constexpr):
    """The features d, up to D, of contiguous rows (pointers [n])."""
    tl.store(rows[:, None] + d[None, :], value.to(rows.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def product(a_nope, a_rope, b_nope, b_rope, DR: tl.constexpr):
    """[nope | rope] [nope | rope]ᵀ in fp32."""
    result = tl.dot(a_nope, tl.trans(b_nope), input_precision="ieee")
    if DR:
        result = tl.dot(a_rope, tl.trans(b_rope), result, input_precision="ieee")
    return result


@triton.jit
def keys(
    t, T, k_nope, k_rope, v, n_at, r_at, v_at,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, LATENT: tl.constexpr, BLOCK_DN: tl.constexpr,
    BLOCK_DR: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Nope, rope and value of the keys t, of one sequence and head; rope is nope where there is none."""
    inside, row = t < T, t.to(tl.int64)
    dn, dr, dv = tl.arange(0, BLOCK_DN), tl.arange(0, BLOCK_DR), tl.arange(0, BLOCK_DV)
    nope = load(k_nope + row * n_at[1], dn, n_at[3], inside, DN, BLOCK_DN, MASKED)
    rope, value = nope, nope
    if DR:
        rope = load(k_rope + row * r_at[1], dr, r_at[2], inside, DR, BLOCK_DR, MASKED)
    if not LATENT:
        value = load(v + row * v_at[1], dv, v_at[3], inside, DV, BLOCK_DV, MASKED)
    return nope, rope, value


@triton.jit
def absorb(
    state, start, first, end, q_nope, q_rope, k_nope, k_rope, v, n_at, r_at, v_at, T, factor,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, LATENT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: state is (accumulator, denominator, maximum) of every row."""
    accumulator, denominator, maximum = state
    t = start + tl.arange(0, COLUMNS)
    nope, rope, value = keys(
        t, T, k_nope, k_rope, v, n_at, r_at, v_at, DN, DR, DV, LATENT, BLOCK_DN, BLOCK_DR, BLOCK_DV, MASKED
    )
    score = product(q_nope, q_rope, nope, rope, DR) * factor
    if MASKED:
        visible = (t[None, :] >= first[:, None]) & (t[None, :] < end[:, None])
        score = tl.where(visible, score, -float("inf"))
    raised = tl.maximum(maximum, tl.max(score, 1))
    shift = raised
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(raised == -float("inf"), 0.0, raised)
    weight = tl.exp2(score - shift[:, None])
    shrink = tl.exp2(maximum - shift)
    denominator = denominator * shrink + tl.sum(weight, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, denominator, raised


@triton.jit
def locate(program, S, T, bounds, offset, H, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """A tile of a launch, the longest first: its sequence, its group of heads, its rows (in the group), their queries,
    heads, whether they exist, and their first and end key; then those of its first query and of its last."""
    tiles = tl.cdiv(S * HEADS, ROWS)
    groups = H // HEADS
    start = (tiles - 1 - program % tiles) * ROWS
    group = program // tiles % groups
    row = start + tl.arange(0, ROWS)
    s = tl.minimum(row // HEADS, S - 1)
    first, end = seen(s, bounds, S, T, offset, CAUSAL)
    lowest, inner_high = seen(start // HEADS, bounds, S, T, offset, CAUSAL)
    last = tl.minimum((start + ROWS - 1) // HEADS, S - 1)
    inner_low, highest = seen(last, bounds, S, T, offset, CAUSAL)
    sequence = (program // tiles // groups).to(tl.int64)
    inside = row < S * HEADS
    return sequence, group, row, s, group + row % HEADS, inside, first, end, lowest, inner_low, inner_high, highest


@triton.jit
def queries(
    q, q_at, sequence, s, head, inside,
    DN: tl.constexpr, DR: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr,
):  # fmt: skip
    """A tile's queries: nope [ROWS, BLOCK_DN] and rope [ROWS, BLOCK_DR], which is nope where there is none."""
    at = q + sequence * q_at[0] + s.to(tl.int64) * q_at[1] + head.to(tl.int64) * q_at[2]
    nope = load(at, tl.arange(0, BLOCK_DN), q_at[3], inside, DN, BLOCK_DN, True)
    rope = nope
    if DR:
        rope = load(at + DN * q_at[3], tl.arange(0, BLOCK_DR), q_at[3], inside, DR, BLOCK_DR, True)
    return nope, rope


@triton.jit(do_not_specialize=("S", "T", "offset"))
def forward_kernel(
    q, k_nope, k_rope, v, out, lse, exponent, rest, bounds,
    q_at, n_at, r_at, v_at,  # strides
    S, T, offset, factor,  # factor: scale · log₂ e
    H: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    sequence, group, row, s, head, inside, first, end, low, inner_low, inner_high, high = locate(
        tl.program_id(0), S, T, bounds, offset, H, HEADS, CAUSAL, ROWS
    )
    dv = tl.arange(0, BLOCK_DV)
    q_nope, q_rope = queries(q, q_at, sequence, s, head, inside, DN, DR, BLOCK_DN, BLOCK_DR)
    k_nope += sequence * n_at[0] + group.to(tl.int64) * n_at[2]
    k_rope += sequence * r_at[0]
    v += sequence * v_at[0] + group.to(tl.int64) * v_at[2]
    state = (
        tl.zeros([ROWS, BLOCK_DV], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], -float("inf"), tl.float32),
    )
    low = low // COLUMNS * COLUMNS
    count, edge, whole = blocks(low, inner_low, inner_high, high, COLUMNS)
    for i in range(count - whole):
        start = low + tl.where(i < edge, i, i + whole) * COLUMNS
        state = absorb(
            state, start, first, end, q_nope, q_rope, k_nope, k_rope, v, n_at, r_at, v_at, T, factor,
            DN, DR, DV, LATENT, COLUMNS, BLOCK_DN, BLOCK_DR, BLOCK_DV, True,
        )  # fmt: skip
    for i in range(edge, edge + whole):
        state = absorb(
            state, low + i * COLUMNS, first, end, q_nope, q_rope, k_nope, k_rope, v, n_at, r_at, v_at, T, factor,
            DN, DR, DV, LATENT, COLUMNS, BLOCK_DN, BLOCK_DR, BLOCK_DV, False,
        )  # fmt: skip
    accumulator, denominator, maximum = state
    blind = denominator == 0
    result = accumulator / tl.where(blind, 1.0, denominator)[:, None]
    at = (sequence * S + s) * H + head
    store(out + at * DV, dv, result, inside, DV)
    if rest is not None:
        store(rest + at * DV, dv, result - result.to(out.dtype.element_ty).to(tl.float32), inside, DV)
    total = tl.where(blind, -float("inf"), maximum + tl.log2(tl.where(blind, 1.0, denominator)))
    tl.store(lse + at, total * LN_2, mask=inside)
    tl.store(exponent + (sequence * (H // HEADS) + group) * S * HEADS + row, total, mask=inside)
