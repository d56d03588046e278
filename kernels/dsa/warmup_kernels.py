"""The indexer's loss in Triton: the kernels of the dense warm-up stage, where a query's keys are all up to itself.

Scores of all queries would be S × S. So forward and backward go by chunks of queries, and for each
    target, I   [B, count, width]  are written by tiles_kernel, tiles of queries and keys: nearly all of the work
    loss, dI    from them by loss_kernel (loss_kernels.py), as in the sparse stage; dI in I's place
    dq, dw      by queries_kernel: a tile of queries and one head, over its keys
    dk          by keys_kernel: a block of keys, over the chunk's queries and every parts-th head
where width is the number of the chunk's keys, up to its last query, rounded up. Nothing but the inputs is kept for the
backward, which makes the chunk's target and I again. Every sum has one order, that of dk over the chunks too. An lse
that isn't given is made by lse_kernel, of all queries: a tile of them and one head, over its keys.

Tiles above the diagonal are left out, and what lies above it in the others is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nam56r.kernels.dsa.attention_kernels import LN_2, load, product, split, store
from nam56r.kernels.dsa.loss_kernels import relu


@triton.jit
def block(start, end, rows, row_at, d, d_at, D: tl.constexpr, COUNT: tl.constexpr):
    """The tokens from start, which of them are before end, and these' features d."""
    token = start + tl.arange(0, COUNT)
    inside = token < end
    return token, inside, load(rows + token.to(tl.int64) * row_at, d, d_at, inside, D)


@triton.jit
def slopes(d_score, t, s, first, end, width):
    """dI of queries t and keys s of a sequence's chunk: 0 above the diagonal and behind the end."""
    at = (t - first).to(tl.int64)[:, None] * width + s[None, :]
    return tl.load(d_score + at, mask=(s[None, :] <= t[:, None]) & (t < end)[:, None], other=0.0)


@triton.jit(do_not_specialize=("S",))
def lse_kernel(
    q, kv, lse,
    q_at, kv_at,  # strides
    S, factor,  # factor: scale · log₂ e
    H: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """lse [B, S, H], from the products that tiles_kernel makes: what rounding does to both of them cancels."""
    tiles = tl.cdiv(S, ROWS)
    head = (tl.program_id(0) % H).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // H % tiles  # the longest first
    sequence = (tl.program_id(0) // H // tiles).to(tl.int64)
    d, t = tl.arange(0, MAIN), tile * ROWS + tl.arange(0, ROWS)
    row, inside = t.to(tl.int64), t < S
    of_rows = q + sequence * q_at[0] + row * q_at[1] + head * q_at[2]
    q_main, q_rest = split(of_rows, d, q_at[3], inside, MAIN, REST, BLOCK_REST)
    maximum, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.minimum((tile + 1) * ROWS, S), COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        of_keys = kv + sequence * kv_at[0] + s.to(tl.int64) * kv_at[1]
        k_main, k_rest = split(of_keys, d, kv_at[2], s < S, MAIN, REST, BLOCK_REST)
        score = product(q_main, q_rest, k_main, k_rest, REST) * factor
        score = tl.where(s[None, :] <= t[:, None], score, -float("inf"))
        raised = tl.maximum(maximum, tl.max(score, 1))  # every query sees key 0
        total = total * tl.exp2(maximum - raised) + tl.sum(tl.exp2(score - raised[:, None]), 1)
        maximum = raised
    tl.store(lse + (sequence * S + row) * H + head, (maximum + tl.log2(total)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=("first", "count"))
def tiles_kernel(
    index_q, index_k, weights, q, kv, lse, target, score,
    index_q_at, index_k_at, weights_at, q_at, kv_at, lse_at,  # strides
    first, count, width, scale,
    HI: tl.constexpr, DI: tl.constexpr, H: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_DI: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    end = first + count
    columns, tiles = tl.cdiv(end, COLUMNS), tl.cdiv(count, ROWS)
    start = tl.program_id(0) % columns * COLUMNS
    tile = tl.program_id(0) // columns % tiles
    sequence = (tl.program_id(0) // columns // tiles).to(tl.int64)
    if start < tl.minimum(first + (tile + 1) * ROWS, end):
        d, di = tl.arange(0, MAIN), tl.arange(0, BLOCK_DI)
        t, s = first + tile * ROWS + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
        inside, row, column = t < end, t.to(tl.int64), s.to(tl.int64)
        at = ((sequence * count + t - first) * width)[:, None] + s[None, :]
        mask = inside[:, None] & (s < width)[None, :]

        of_keys = kv + sequence * kv_at[0] + column * kv_at[1]
        k_main, k_rest = split(of_keys, d, kv_at[2], s < end, MAIN, REST, BLOCK_REST)
        of_rows, of_lse = q + sequence * q_at[0] + row * q_at[1], lse + sequence * lse_at[0] + row * lse_at[1]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for head in range(0, H):
            wide = tl.full([], 0, tl.int64) + head
            q_main, q_rest = split(of_rows + wide * q_at[2], d, q_at[3], inside, MAIN, REST, BLOCK_REST)
            of_head = tl.load(of_lse + wide * lse_at[2], mask=inside, other=0.0).to(tl.float32)
            total += tl.exp(product(q_main, q_rest, k_main, k_rest, REST) * scale - of_head[:, None])
        tl.store(target + at, total, mask=mask)

        of_keys = index_k + sequence * index_k_at[0] + column * index_k_at[1]
        key = load(of_keys, di, index_k_at[2], s < end, DI)
        of_rows = index_q + sequence * index_q_at[0] + row * index_q_at[1]
        of_weights = weights + sequence * weights_at[0] + row * weights_at[1]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for head in range(0, HI):
            wide = tl.full([], 0, tl.int64) + head
            query = load(of_rows + wide * index_q_at[2], di, index_q_at[3], inside, DI)
            weight = tl.load(of_weights + wide * weights_at[2], mask=inside, other=0.0).to(tl.float32)
            total += relu(tl.dot(query, tl.trans(key), input_precision="ieee")) * weight[:, None]
        tl.store(score + at, total, mask=mask)


@triton.jit(do_not_specialize=("first", "count", "S"))
def queries_kernel(
    d_loss, d_score, index_q, index_k, weights, dq, dw,
    d_loss_at, index_q_at, index_k_at, weights_at,  # strides
    first, count, S, width,
    HI: tl.constexpr, DI: tl.constexpr, BLOCK_DI: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    end, tiles = first + count, tl.cdiv(count, ROWS)
    head = (tl.program_id(0) % HI).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // HI % tiles  # the longest first
    sequence = (tl.program_id(0) // HI // tiles).to(tl.int64)
    di = tl.arange(0, BLOCK_DI)
    at = index_q + sequence * index_q_at[0] + head * index_q_at[2]
    t, inside, query = block(first + tile * ROWS, end, at, index_q_at[1], di, index_q_at[3], DI, ROWS)
    d_score += sequence * count * width
    index_k += sequence * index_k_at[0]
    accumulator = tl.zeros([ROWS, BLOCK_DI], tl.float32)
    for start in range(0, tl.minimum(first + (tile + 1) * ROWS, end), COLUMNS):
        s, _, key = block(start, end, index_k, index_k_at[1], di, index_k_at[2], DI, COLUMNS)
        slope = slopes(d_score, t, s, first, end, width)
        x = tl.dot(query, tl.trans(key), input_precision="ieee")
        accumulator = tl.dot(tl.where(x > 0, slope, 0.0).to(key.dtype), key, accumulator, input_precision="ieee")
    row = t.to(tl.int64)
    at = weights + sequence * weights_at[0] + row * weights_at[1] + head * weights_at[2]
    weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(d_loss + sequence * d_loss_at[0] + row * d_loss_at[1], mask=inside, other=0.0)
    at = (sequence * S + row) * HI + head
    store(dq + at * DI, di, accumulator * (weight * given)[:, None], inside, DI, False)
    tl.store(dw + at, given * tl.sum(accumulator * query.to(tl.float32), 1), mask=inside)


@triton.jit(do_not_specialize=("first", "count", "S", "parts"))
def keys_kernel(
    d_loss, d_score, index_q, index_k, weights, total,
    d_loss_at, index_q_at, index_k_at, weights_at,  # strides
    first, count, S, width, parts,
    HI: tl.constexpr, DI: tl.constexpr, BLOCK_DI: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds this chunk's part to total [B, parts, S, DI]."""
    end = first + count
    columns = tl.cdiv(end, COLUMNS)
    start = tl.program_id(0) % columns * COLUMNS
    part = tl.program_id(0) // columns % parts
    sequence = (tl.program_id(0) // columns // parts).to(tl.int64)
    di = tl.arange(0, BLOCK_DI)
    at = index_k + sequence * index_k_at[0]
    s, present, key = block(start, end, at, index_k_at[1], di, index_k_at[2], DI, COLUMNS)
    d_loss += sequence * d_loss_at[0]
    d_score += sequence * count * width
    index_q += sequence * index_q_at[0]
    weights += sequence * weights_at[0]
    low = first + tl.maximum(start - first, 0) // ROWS * ROWS  # the first tile of queries that see one of the keys
    accumulator = tl.zeros([COLUMNS, BLOCK_DI], tl.float32)
    for head in range(part, HI, parts):
        wide = tl.full([], 0, tl.int64) + head
        for begin in range(low, end, ROWS):
            t, inside, query = block(
                begin, end, index_q + wide * index_q_at[2], index_q_at[1], di, index_q_at[3], DI, ROWS
            )
            row = t.to(tl.int64)
            weight = tl.load(weights + row * weights_at[1] + wide * weights_at[2], mask=inside, other=0.0)
            weight = weight.to(tl.float32) * tl.load(d_loss + row * d_loss_at[1], mask=inside, other=0.0)
            slope = slopes(d_score, t, s, first, end, width)
            x = tl.dot(query, tl.trans(key), input_precision="ieee")
            of_active = tl.where(x > 0, slope, 0.0).to(query.dtype)
            # the factors go to the query, not to dI, which they could make too small for fp16
            weighted = (query.to(tl.float32) * weight[:, None]).to(query.dtype)
            accumulator = tl.dot(tl.trans(of_active), weighted, accumulator, input_precision="ieee")
    at = total + ((sequence * parts + part) * S + s) * DI
    accumulator += load(at, di, 1, present, DI)
    store(at, di, accumulator, present, DI, False)
