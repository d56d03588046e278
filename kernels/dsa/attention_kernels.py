"""Sparse absorbed attention in Triton: the kernels, which take keys by index. A key is [nope | rope], its value nope.

    P = exp(scale q kᵀ − lse),  out = P nope                                     forward_kernel
    delta = Σ_d dout (out + rest),  dS = scale P ⊙ (dout nopeᵀ − delta)
    dq = dS k                                                                    backward_kernel
    a row for every key of every query: Σ_heads [dSᵀ q_nope + Pᵀ dout | dSᵀ q_rope]   backward_kernel or rows_kernel

A query's heads share its keys, and nothing else does. So a program is a query with all its heads, or a block of them,
and everything lies keys first: scores are [KEYS, HEADS], sums over keys [features, HEADS]. KEYS and features fill
Hopper's 64 rows of a product where few heads would not. Programs of neighbouring queries, which select much the same
keys, run close in time: most rows come from the L2 cache.

Where all heads are one block, backward_kernel makes dq and rows from one set of scores. Where they are not, it makes dq
alone, and rows_kernel, a program a query and block of keys, makes the rows from scores of its own, one block of heads
after the other. Rows go to a buffer, to be summed by key (by_key.py), or are added to the sums with ATOMIC.

rest is what the rounding of out to 16 bits lost: where one key has nearly all the weight, dout nopeᵀ and delta are
nearly equal, and out's rounding would be all of their difference. exponent is lse in base 2, not rounded twice.
Feature dims are padded to powers of two with zeros that are not read, nor is any row for an index of -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
PIECE = tl.constexpr(64)  # features of fp32 that one thread adds up, one after the other


@triton.jit
def load(rows, d, d_at, inside, D: tl.constexpr):
    """The features d of rows (pointers [n]): zeros behind D and where not inside [n]."""
    return tl.load(rows[:, None] + (d.to(tl.int64) * d_at)[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store(rows, d, value, inside, D: tl.constexpr, ATOMIC: tl.constexpr):
    """The features d, up to D, of contiguous rows (pointers [n]): written or, with ATOMIC, added."""
    at, mask = rows[:, None] + d[None, :], inside[:, None] & (d < D)[None, :]
    if ATOMIC:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def locate(query, first, count):
    """The sequence and position of a query, counted over all sequences' count queries from first on."""
    return (query // count).to(tl.int64), (first + query % count).to(tl.int64)


@triton.jit
def heads_of(block, H: tl.constexpr, HEADS: tl.constexpr):
    """A block's heads, and which there are."""
    head = block * HEADS + tl.arange(0, HEADS)
    return head.to(tl.int64), head < H


@triton.jit
def select(indices, start, K, k_at, KEYS: tl.constexpr):
    """A block of a query's indices: their positions in the row, the keys, and which there are."""
    k = start + tl.arange(0, KEYS)
    key = tl.load(indices + k.to(tl.int64) * k_at, mask=k < K, other=-1)
    return k, key.to(tl.int64), key >= 0


@triton.jit
def split(row, d, d_at, inside, L: tl.constexpr, DR: tl.constexpr, BLOCK_DR: tl.constexpr):
    """The features d of nope, and rope, of rows (pointers [n]); rope is nope where there is none."""
    nope = load(row, d, d_at, inside, L)
    rope = nope
    if DR:
        rope = load(row + L * d_at, tl.arange(0, BLOCK_DR), d_at, inside, DR)
    return nope, rope


@triton.jit
def inner(a, b, beside):
    """a bᵀ + beside, in fp32, of a [m, d] and b [n, d].

    In fp32 d is added up in pieces, and these then: 512 features one after the other round three times as much as
    PyTorch's products, which split them too.
    """
    pieces: tl.constexpr = a.shape[1] // PIECE
    if a.dtype == tl.float32 and pieces > 1:
        left = tl.permute(tl.reshape(a, (a.shape[0], pieces, PIECE)), (1, 0, 2))
        right = tl.permute(tl.reshape(b, (b.shape[0], pieces, PIECE)), (1, 2, 0))
        result = tl.sum(tl.dot(left, right, input_precision="ieee"), 0) + beside
    elif a.dtype == tl.float32:
        result = tl.dot(a, tl.trans(b), input_precision="ieee") + beside
    else:
        result = tl.dot(a, tl.trans(b), beside)
    return result


@triton.jit
def product(a_nope, a_rope, b_nope, b_rope, DR: tl.constexpr):
    """[nope | rope] [nope | rope]ᵀ in fp32."""
    result = inner(a_nope, b_nope, tl.zeros([a_nope.shape[0], b_nope.shape[0]], tl.float32))
    if DR:
        result = inner(a_rope, b_rope, result)
    return result


@triton.jit(do_not_specialize=("S", "K"))
def forward_kernel(
    q, kv, indices, out, lse, exponent, rest,
    q_at, kv_at, indices_at,  # strides
    S, K, factor,  # factor: scale · log₂ e
    H: tl.constexpr, L: tl.constexpr, DR: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DR: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    sequence, s = locate(tl.program_id(0) // blocks, 0, S)
    head, inside = heads_of(tl.program_id(0) % blocks, H, HEADS)
    d = tl.arange(0, BLOCK_L)
    at = q + sequence * q_at[0] + s * q_at[1] + head * q_at[2]
    q_nope, q_rope = split(at, d, q_at[3], inside, L, DR, BLOCK_DR)
    kv += sequence * kv_at[0]
    indices += sequence * indices_at[0] + s * indices_at[1]
    maximum = tl.full([HEADS], -float("inf"), tl.float32)
    denominator = tl.zeros([KEYS, HEADS], tl.float32)  # keys apart, so that warps need not meet over it in every block
    accumulator = tl.zeros([BLOCK_L, HEADS], tl.float32)
    for start in range(0, K, KEYS):
        _, key, there = select(indices, start, K, indices_at[2], KEYS)
        nope, rope = split(kv + key * kv_at[1], d, kv_at[2], there, L, DR, BLOCK_DR)
        score = product(nope, rope, q_nope, q_rope, DR) * factor
        score = tl.where(there[:, None], score, -float("inf"))
        raised = tl.maximum(maximum, tl.max(score, 0))
        shift = tl.where(raised == -float("inf"), 0.0, raised)  # there may have been no key yet
        weight = tl.exp2(score - shift[None, :])
        shrink = tl.exp2(maximum - shift)
        denominator = denominator * shrink[None, :] + weight
        accumulator = accumulator * shrink[None, :]
        accumulator = tl.dot(tl.trans(nope), weight.to(nope.dtype), accumulator, input_precision="ieee")
        maximum = raised
    total = tl.sum(denominator, 0)
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    result = tl.trans(accumulator / total[None, :])
    total = tl.where(blind, -float("inf"), maximum + tl.log2(total))
    at = (sequence * S + s) * H + head
    store(out + at * L, d, result, inside, L, False)
    if rest is not None:
        store(rest + at * L, d, result - result.to(out.dtype.element_ty).to(tl.float32), inside, L, False)
    tl.store(lse + at, total * LN_2, mask=inside)
    tl.store(exponent + at, total, mask=inside)


@triton.jit
def weigh(
    nope, other, rope, there, q_nope, q_other, q_rope, given, given_other, total, delta, scale, factor,
    DR: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """P and dS [KEYS, HEADS], in the keys' dtype; with two HALVES the other's features count as well."""
    score = product(nope, rope, q_nope, q_rope, DR)
    of_weight = inner(nope, given, tl.zeros([nope.shape[0], given.shape[0]], tl.float32))
    if HALVES == 2:
        score = inner(other, q_other, score)
        of_weight = inner(other, given_other, of_weight)
    weight = tl.where(there[:, None], tl.exp2(score * factor - total[None, :]), 0.0)
    of_score = weight * (of_weight - delta[None, :]) * scale
    return weight.to(nope.dtype), of_score.to(nope.dtype)


@triton.jit
def place(rows, position, sequence, s, k, key, there, S, K, WIDTH: tl.constexpr, ATOMIC: tl.constexpr):
    """Where a query's rows for a block of keys go: to their positions (by_key.py) or, with ATOMIC, the keys' [B, S]."""
    if ATOMIC:
        row = sequence * S + key
    else:
        row = tl.load(position + (sequence * S + s) * K + k, mask=there, other=0).to(tl.int64)
    return rows + row * WIDTH


@triton.jit(do_not_specialize=("first", "count", "S", "K"))
def backward_kernel(
    q, kv, indices, dout, out, rest, exponent, delta, dq, rows, position,
    q_at, kv_at, indices_at, dout_at,  # strides
    first, count, S, K, scale, factor,  # factor: scale · log₂ e
    H: tl.constexpr, L: tl.constexpr, DR: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DR: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Of the queries from first to first + count: dq and, unless they are None, delta (kept for rows_kernel) and rows
    (all heads must be one block)."""
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    sequence, s = locate(tl.program_id(0) // blocks, first, count)
    head, inside = heads_of(tl.program_id(0) % blocks, H, HEADS)
    d, dr = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_DR)
    at = q + sequence * q_at[0] + s * q_at[1] + head * q_at[2]
    q_nope, q_rope = split(at, d, q_at[3], inside, L, DR, BLOCK_DR)
    given = load(dout + sequence * dout_at[0] + s * dout_at[1] + head * dout_at[2], d, dout_at[3], inside, L)
    at = (sequence * S + s) * H + head
    whole = load(out + at * L, d, 1, inside, L).to(tl.float32)
    if rest is not None:
        whole += load(rest + at * L, d, 1, inside, L).to(tl.float32)
    subtract = tl.sum(given.to(tl.float32) * whole, 1)
    if delta is not None:
        tl.store(delta + at, subtract, mask=inside)
    total = tl.load(exponent + at, mask=inside, other=0.0)
    kv += sequence * kv_at[0]
    indices += sequence * indices_at[0] + s * indices_at[1]
    d_nope, d_rope = tl.zeros([BLOCK_L, HEADS], tl.float32), tl.zeros([BLOCK_DR, HEADS], tl.float32)
    for start in range(0, K, KEYS):
        k, key, there = select(indices, start, K, indices_at[2], KEYS)
        nope, rope = split(kv + key * kv_at[1], d, kv_at[2], there, L, DR, BLOCK_DR)
        weight, of_score = weigh(
            nope, nope, rope, there, q_nope, q_nope, q_rope, given, given, total, subtract, scale, factor, DR, 1
        )
        d_nope = tl.dot(tl.trans(nope), of_score, d_nope, input_precision="ieee")
        if DR:
            d_rope = tl.dot(tl.trans(rope), of_score, d_rope, input_precision="ieee")
        if rows is not None:
            target = place(rows, position, sequence, s, k, key, there, S, K, L + DR, ATOMIC)
            of_nope = tl.dot(of_score, q_nope, input_precision="ieee")
            of_nope = tl.dot(weight, given, of_nope, input_precision="ieee")
            store(target, d, of_nope, there, L, ATOMIC)
            if DR:
                store(target + L, dr, tl.dot(of_score, q_rope, input_precision="ieee"), there, DR, ATOMIC)
    target = dq + at * (L + DR)
    store(target, d, tl.trans(d_nope), inside, L, False)
    if DR:
        store(target + L, dr, tl.trans(d_rope), inside, DR, False)


@triton.jit(do_not_specialize=("first", "count", "S", "K"))
def rows_kernel(
    q, kv, indices, dout, exponent, delta, rows, position,
    q_at, kv_at, indices_at, dout_at,  # strides
    first, count, S, K, scale, factor,  # factor: scale · log₂ e
    H: tl.constexpr, L: tl.constexpr, DR: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DR: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, ATOMIC: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The rows of the queries from first to first + count. BLOCK_L is that of a half, if there are two."""
    half, program = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES
    blocks = tl.cdiv(K, KEYS)
    sequence, s = locate(program // blocks, first, count)
    d, beside = half * BLOCK_L + tl.arange(0, BLOCK_L), (1 - half) * BLOCK_L + tl.arange(0, BLOCK_L)
    dr = tl.arange(0, BLOCK_DR)
    indices += sequence * indices_at[0] + s * indices_at[1]
    k, key, there = select(indices, program % blocks * KEYS, K, indices_at[2], KEYS)
    row = kv + sequence * kv_at[0] + key * kv_at[1]
    nope, rope = split(row, d, kv_at[2], there, L, DR, BLOCK_DR)
    other = nope
    if HALVES == 2:
        other = load(row, beside, kv_at[2], there, L)
    of_nope, of_rope = tl.zeros([KEYS, BLOCK_L], tl.float32), tl.zeros([KEYS, BLOCK_DR], tl.float32)
    for block in range(tl.cdiv(H, HEADS)):
        head, inside = heads_of(block, H, HEADS)
        at = q + sequence * q_at[0] + s * q_at[1] + head * q_at[2]
        q_nope, q_rope = split(at, d, q_at[3], inside, L, DR, BLOCK_DR)
        from_out = dout + sequence * dout_at[0] + s * dout_at[1] + head * dout_at[2]
        given = load(from_out, d, dout_at[3], inside, L)
        q_other, given_other = q_nope, given
        if HALVES == 2:
            q_other = load(at, beside, q_at[3], inside, L)
            given_other = load(from_out, beside, dout_at[3], inside, L)
        of_head = (sequence * S + s) * H + head
        total = tl.load(exponent + of_head, mask=inside, other=0.0)
        subtract = tl.load(delta + of_head, mask=inside, other=0.0)
        weight, of_score = weigh(
            nope, other, rope, there, q_nope, q_other, q_rope, given, given_other, total, subtract, scale, factor,
            DR, HALVES,
        )  # fmt: skip
        of_nope = tl.dot(of_score, q_nope, of_nope, input_precision="ieee")
        of_nope = tl.dot(weight, given, of_nope, input_precision="ieee")
        if DR:
            of_rope = tl.dot(of_score, q_rope, of_rope, input_precision="ieee")
    target = place(rows, position, sequence, s, k, key, there, S, K, L + DR, ATOMIC)
    store(target, d, of_nope, there, L, ATOMIC)
    if DR:
        store(target + L, dr, of_rope, there & (half == 0), DR, ATOMIC)
