"""The indexer's loss in Triton: the kernels of the sparse stage, where every query has keys of its own.

    target = Σ_heads exp(scale q kᵀ − lse),  I = Σ_h w_h relu(x_h),  x_h = index_q_h index_k       scores_kernel
    Z = Σ target,  p = softmax(I),  loss = Σ target / Z (log(target / Z) − log p)
    dI = p − target / Z                                                                            loss_kernel
    dq_h = w_h Σ_s dI_s [x_h > 0] k_s,  dw_h = q_h Σ_s dI_s [x_h > 0] k_s
    a row for every key of every query: dI_s Σ_h w_h [x_h > 0] q_h                                 gradient_kernel

A program of scores_kernel and gradient_kernel is a query with all its heads; a block of its keys is gathered once for
all of them. Scores lie keys first, [KEYS, HEADS]: KEYS fill Hopper's 64 rows of a product where few heads would not.
target and I, fp32, go to memory, where loss_kernel, a program a query, turns I into dI; that is all the backward keeps.
It reads 8 bytes a key, little beside the key itself. dI's factors w and the gradient of the loss are multiplied in, in
fp32, behind the products that round dI to 16 bits, and dI behind those that round w: fp16 holds each, not what they make.

q's features, up to 576, are split into a power of two and a rest. Bound by the gathers, mostly from the L2 cache:
programs of neighbouring queries, which select much the same keys, run close in time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nam56r.kernels.dsa.attention_kernels import heads_of, load, locate, place, product, select, split, store

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32


@triton.jit
def relu(x):
    """NaN stays, as in PyTorch's."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def attending(q, q_at, lse, lse_at, i, d, H: tl.constexpr, HEADS: tl.constexpr, MAIN: tl.constexpr,
              REST: tl.constexpr, BLOCK_REST: tl.constexpr):  # fmt: skip
    """A query's i-th block of heads: q's features, and lse."""
    head, inside = heads_of(i, H, HEADS)
    main, rest = split(q + head * q_at[2], d, q_at[3], inside, MAIN, REST, BLOCK_REST)
    return main, rest, tl.load(lse + head * lse_at[2], mask=inside, other=float("inf")).to(tl.float32)


@triton.jit
def indexing(index_q, index_q_at, weights, weights_at, i, di, HI: tl.constexpr, HEADS: tl.constexpr, DI: tl.constexpr):
    """A query's i-th block of index heads: index_q, and weights."""
    head, inside = heads_of(i, HI, HEADS)
    weight = tl.load(weights + head * weights_at[2], mask=inside, other=0.0).to(tl.float32)
    return load(index_q + head * index_q_at[2], di, index_q_at[3], inside, DI), weight


@triton.jit
def attention(k_main, k_rest, q_main, q_rest, lse, scale, REST: tl.constexpr):
    """Σ_heads exp(scale q kᵀ − lse) of a block of keys."""
    logit = product(k_main, k_rest, q_main, q_rest, REST) * scale
    return tl.sum(tl.exp(logit - lse[None, :]), 1)


@triton.jit
def index(keys, query, weight):
    """Σ_h w_h relu(x_h) of a block of keys."""
    x = tl.dot(keys, tl.trans(query), input_precision="ieee")
    return tl.sum(relu(x) * weight[None, :], 1)


@triton.jit(do_not_specialize=("S", "K"))
def scores_kernel(
    index_q, index_k, weights, q, kv, lse, indices, target, score,
    index_q_at, index_k_at, weights_at, q_at, kv_at, lse_at, indices_at,  # strides
    S, K, scale,
    HI: tl.constexpr, DI: tl.constexpr, H: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_DI: tl.constexpr, BLOCK_REST: tl.constexpr, INDEX_HEADS: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """target and I of every query's keys; those of an index of -1 are of no key."""
    sequence, s = locate(tl.program_id(0), 0, S)
    d, di = tl.arange(0, MAIN), tl.arange(0, BLOCK_DI)
    index_q += sequence * index_q_at[0] + s * index_q_at[1]
    weights += sequence * weights_at[0] + s * weights_at[1]
    q += sequence * q_at[0] + s * q_at[1]
    lse += sequence * lse_at[0] + s * lse_at[1]
    index_k += sequence * index_k_at[0]
    kv += sequence * kv_at[0]
    indices += sequence * indices_at[0] + s * indices_at[1]
    row = (sequence * S + s) * K
    # heads of one block are loaded once, for the compiler does it again with every block of keys
    main, rest, of_heads = attending(q, q_at, lse, lse_at, 0, d, H, HEADS, MAIN, REST, BLOCK_REST)
    query, weight = indexing(index_q, index_q_at, weights, weights_at, 0, di, HI, INDEX_HEADS, DI)
    for start in range(0, K, KEYS):
        k, key, there = select(indices, start, K, indices_at[2], KEYS)
        k_main, k_rest = split(kv + key * kv_at[1], d, kv_at[2], there, MAIN, REST, BLOCK_REST)
        total = tl.zeros([KEYS], tl.float32)
        if H <= HEADS:
            total += attention(k_main, k_rest, main, rest, of_heads, scale, REST)
        else:
            for i in range(0, tl.cdiv(H, HEADS)):
                q_main, q_rest, of_some = attending(q, q_at, lse, lse_at, i, d, H, HEADS, MAIN, REST, BLOCK_REST)
                total += attention(k_main, k_rest, q_main, q_rest, of_some, scale, REST)
        tl.store(target + row + k, total, mask=k < K)
        key_index = load(index_k + key * index_k_at[1], di, index_k_at[2], there, DI)
        total = tl.zeros([KEYS], tl.float32)
        if HI <= INDEX_HEADS:
            total += index(key_index, query, weight)
        else:
            for i in range(0, tl.cdiv(HI, INDEX_HEADS)):
                some, of_some = indexing(index_q, index_q_at, weights, weights_at, i, di, HI, INDEX_HEADS, DI)
                total += index(key_index, some, of_some)
        tl.store(score + row + k, total, mask=k < K)


@triton.jit
def entries(indices, start, end, k_at, BLOCK: tl.constexpr):
    """A block of a row's entries up to end: their positions, and which have a key; all have without indices."""
    k = start + tl.arange(0, BLOCK).to(tl.int64)
    there = k < end
    if indices is not None:
        there = tl.load(indices + k * k_at, mask=there, other=-1) >= 0
    return k, there


@triton.jit(do_not_specialize=("first", "count", "S", "K"))
def loss_kernel(
    target, score, indices, loss, indices_at, first, count, S, K, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss of the queries from first to first + count, unless it is None, from target and I [B, count, K], and
    with GRADIENT dI in I's place. Without indices a query's keys are those up to itself, in their order."""
    sequence, s = locate(tl.program_id(0), first, count)
    row = (sequence * count + s - first) * K
    end = s + 1
    if indices is not None:
        indices += sequence * indices_at[0] + s * indices_at[1]
        end = tl.zeros([], tl.int64) + K
    total = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, end, BLOCK):
        k, there = entries(indices, start, end, indices_at[2], BLOCK)
        total += tl.load(target + row + k, mask=there, other=0.0)
        x = tl.load(score + row + k, mask=there, other=-float("inf"))
        raised = tl.maximum(maximum, x)
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        denominator = denominator * tl.exp(maximum - shift) + tl.exp(x - shift)
        maximum = raised
    mass = tl.sum(total, 0)
    highest = tl.max(maximum, 0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    of_all = tl.sum(denominator * tl.exp(maximum - highest), 0)
    log_of_all = tl.log(tl.where(of_all == 0, 1.0, of_all))
    share = tl.where(mass == 0, 0.0, 1.0)  # a target of zeros pulls at nothing
    divergence = tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        k, there = entries(indices, start, end, indices_at[2], BLOCK)
        wanted = tl.div_rn(tl.load(target + row + k, mask=there, other=0.0), tl.maximum(mass, TINY))
        predicted = tl.load(score + row + k, mask=there, other=0.0) - highest - log_of_all
        nothing = wanted == 0
        divergence += tl.where(nothing, 0.0, wanted * (tl.log(tl.where(nothing, 1.0, wanted)) - predicted))
        if GRADIENT:
            slope = tl.where(there, share * tl.exp(predicted) - wanted, 0.0)
            tl.store(score + row + k, slope, mask=k < end)
    if loss is not None:
        tl.store(loss + sequence * S + s, tl.sum(divergence, 0))


@triton.jit(do_not_specialize=("first", "count", "S", "K"))
def gradient_kernel(
    d_loss, d_score, index_q, index_k, weights, indices, dq, rows, position, dw,
    d_loss_at, index_q_at, index_k_at, weights_at, indices_at,  # strides
    first, count, S, K,
    HI: tl.constexpr, DI: tl.constexpr, BLOCK_DI: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    ATOMIC: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Of the queries from first to first + count: dq, dw, and the rows of their keys. HEADS are all heads; TURNED sums
    dq features first, where heads don't fill the 64 rows of a product."""
    sequence, s = locate(tl.program_id(0), first, count)
    head, inside = heads_of(0, HI, HEADS)
    di = tl.arange(0, BLOCK_DI)
    at = index_q + sequence * index_q_at[0] + s * index_q_at[1] + head * index_q_at[2]
    query = load(at, di, index_q_at[3], inside, DI)
    at = weights + sequence * weights_at[0] + s * weights_at[1] + head * weights_at[2]
    weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(d_loss + sequence * d_loss_at[0] + s * d_loss_at[1])
    index_k += sequence * index_k_at[0]
    indices += sequence * indices_at[0] + s * indices_at[1]
    d_score += (sequence * S + s) * K
    accumulator = tl.zeros([BLOCK_DI if TURNED else HEADS, HEADS if TURNED else BLOCK_DI], tl.float32)
    for start in range(0, K, KEYS):
        k, key, there = select(indices, start, K, indices_at[2], KEYS)
        of_key = load(index_k + key * index_k_at[1], di, index_k_at[2], there, DI)
        slope = tl.load(d_score + k, mask=k < K, other=0.0)
        active = tl.dot(of_key, tl.trans(query), input_precision="ieee") > 0
        of_active = tl.where(active, weight[None, :], 0.0).to(query.dtype)
        row = tl.dot(of_active, query, input_precision="ieee") * (slope * given)[:, None]
        target = place(rows, position, sequence, s, k, key, there, S, K, DI, ATOMIC)
        store(target, di, row, there, DI, ATOMIC)
        of_active = tl.where(active, slope[:, None], 0.0).to(query.dtype)
        if TURNED:
            accumulator = tl.dot(tl.trans(of_key), of_active, accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(tl.trans(of_active), of_key, accumulator, input_precision="ieee")
    if TURNED:
        accumulator = tl.trans(accumulator)
    at = (sequence * S + s) * HI + head
    store(dq + at * DI, di, accumulator * (weight * given)[:, None], inside, DI, False)
    tl.store(dw + at, given * tl.sum(accumulator * query.to(tl.float32), 1), mask=inside)
