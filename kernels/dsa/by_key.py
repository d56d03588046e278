"""What every (query, key) pair adds to its key, summed in one order: the gradient of keys that queries select.

Queries go by in chunks. A kernel writes one row for each pair of a chunk to where `Order` says: rows of a key side by
side, by query. `add_rows` adds them to the key's total in fp32. No atomics of floats: the same bits every time. Nothing
is read by the host, so all of it can be captured in a graph.

    order = Order(indices, row_bytes)
    for i, chunk in enumerate(order.chunks):
        rows = ...                      [pairs of a chunk, D], that of pair (b, s, k) at order.position[b, s, k]
        order.add_rows(total, rows, i)

An order by key of what is ordered by query is a transposition, and needs no sorting. A chunk is cut into runs of
queries, and a program goes through a run a query at a time, with a counter for each key: what a counter was is the
pair's rank among its key's in the run (rank_kernel). A query has a key once, so of the counters a step increments no
two are one, and a barrier lies between steps: ranks are the same every time. The counters then hold how many pairs a
run has of a key; their running sum, in the order (chunk, sequence, key, run), and the rank make the position
(position_kernel). Both are bound by the latency of memory: a query's keys are anywhere.

add_rows: a warp a key and block of features; PARTS tiles of ROWS rows on their way at a time, added ROWS apart, then
together. It is bound by memory, for every row is read once, and where a key has many thousands of rows by that warp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

MOST_BYTES = 512 * 2**20  # of a chunk's rows; more where the chunks would be more than RUNS
RUNS = 256  # of all chunks, so a key has as many counters at most
QUERIES = 16  # of a run at least
STEPS = 4  # of a run, on their way at a time
BLOCK = 1024  # of a query's pairs, that a step takes at most
TILE = 512  # elements of add_rows' tiles
PARTS = 8


def chunks(batch: int, queries: int, top_k: int, row_bytes: int, least: int = 1) -> Iterator[slice]:
    """Slices of the queries, of nearly one size, with at most MOST_BYTES of rows, or as many queries as least."""
    most = max(least, MOST_BYTES // max(1, batch * top_k * row_bytes))
    each = triton.cdiv(queries, triton.cdiv(queries, most)) if queries else 1
    return (slice(start, min(start + each, queries)) for start in range(0, queries, each))


def buffer_bytes(queries: int, top_k: int, row_bytes: int) -> int:
    """At most: a chunk's rows, all pairs' positions, and counters; of all sequences' queries."""
    rows = min(queries, max(triton.cdiv(queries, RUNS), MOST_BYTES // max(1, top_k * row_bytes))) * top_k * row_bytes
    return rows + 4 * queries * (top_k + RUNS)


class Order:
    """Where the rows of the pairs of indices [B, S, K] (-1: none) go, each of row_bytes.

    chunks    slices of the queries
    pairs     of the largest chunk
    position  [B, S, K] int32, of a pair's row among its chunk's; undefined where there is no key
    starts    [chunks · B · S · runs + 1] int32: how many pairs are before those of a chunk, sequence, key and run. It
              may overflow, but differences within a chunk are right
    """

    def __init__(self, indices: torch.Tensor, row_bytes: int):
        B, S, K = indices.shape
        self.chunks = list(chunks(B, S, K, row_bytes, triton.cdiv(S, RUNS)))
        count = self.chunks[0].stop  # the first is the longest
        self.pairs = B * count * K
        each = max(QUERIES, triton.cdiv(count, RUNS // len(self.chunks)))
        self.runs = triton.cdiv(count, each)
        self.slots = B * S * self.runs  # of a chunk
        self.position = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        self.starts = torch.zeros(len(self.chunks) * self.slots + 1, dtype=torch.int32, device=indices.device)
        block = min(BLOCK, max(32, triton.next_power_of_2(K)))
        tensors, sizes = (indices, self.position, self.starts), (indices.stride(), S, K, count, each, self.runs)
        with torch.cuda.device_of(indices):
            rank_kernel[(len(self.chunks) * B * self.runs,)](
                *tensors, *sizes, B, BLOCK=block, STEPS=STEPS, num_warps=max(1, block // 128)
            )
            self.starts.cumsum_(0)
            position_kernel[(B * S,)](*tensors, *sizes, B, BLOCK=block)

    def add_rows(self, total: torch.Tensor, rows: torch.Tensor, chunk: int) -> None:
        """total [B, S, D] (fp32, contiguous) += each key's of a chunk's rows [pairs, D] (any float, contiguous).

        D is any width. Rows where no pair is are not read.
        """
        width, slots = total.shape[-1], self.slots
        features = min(128, max(16, triton.next_power_of_2(width)))
        with torch.cuda.device_of(total):
            add_rows_kernel[(slots // self.runs, triton.cdiv(width, features))](
                total, rows, self.starts, chunk * slots, self.runs, width,
                PARTS=PARTS, ROWS=TILE // features, FEATURES=features, num_warps=1,
            )  # fmt: skip


@triton.jit
def slot(chunk, sequence, key, run, B, S, runs):
    """A run's counter of a key, behind which stands where its pairs start."""
    return ((chunk.to(tl.int64) * B + sequence) * S + key) * runs + run


@triton.jit(do_not_specialize=("S", "K", "count", "each", "runs", "B"))
def rank_kernel(
    indices, rank, counters,
    indices_at,  # strides
    S, K, count, each, runs, B,  # of a chunk: queries, of a run, and runs
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A run's ranks. A step is a query's keys, or BLOCK of them."""
    run, sequence, chunk = tl.program_id(0) % runs, tl.program_id(0) // runs % B, tl.program_id(0) // runs // B
    start = chunk * count + run * each
    end = tl.minimum(tl.minimum(start + each, (chunk + 1) * count), S)
    wide = sequence.to(tl.int64)
    counters += 1 + slot(chunk, wide, 0, run, B, S, runs)
    indices += wide * indices_at[0]
    rank += wide * S * K
    blocks = tl.cdiv(K, BLOCK)
    for first in range(start * blocks, end * blocks, STEPS):
        asked = ()
        for i in tl.static_range(STEPS):
            s = ((first + i) // blocks).to(tl.int64)
            k = (first + i) % blocks * BLOCK + tl.arange(0, BLOCK)
            k = tl.max_contiguous(k, 1)
            inside = (k < K) & (first + i < end * blocks)
            key = tl.load(indices + s * indices_at[1] + k.to(tl.int64) * indices_at[2], mask=inside, other=-1)
            asked = asked + ((s * K + k, key.to(tl.int64)),)  # type: ignore[assignment]
        told = ()
        for i in tl.static_range(STEPS):
            key = asked[i][1]
            before = tl.atomic_add(counters + key * runs, 1, mask=key >= 0, sem="relaxed")
            told = told + (before,)  # type: ignore[assignment]
            tl.debug_barrier()
        for i in tl.static_range(STEPS):
            tl.store(rank + asked[i][0], told[i], mask=asked[i][1] >= 0)


@triton.jit(do_not_specialize=("S", "K", "count", "each", "runs", "B"))
def position_kernel(
    indices, rank, starts,
    indices_at,  # strides
    S, K, count, each, runs, B,  # of a chunk: queries, of a run, and runs
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A query's positions, in the ranks' place."""
    query, sequence, s = tl.program_id(0).to(tl.int64), tl.program_id(0) // S, tl.program_id(0) % S
    chunk, run = s // count, s % count // each
    wide = sequence.to(tl.int64)
    indices += wide * indices_at[0] + s.to(tl.int64) * indices_at[1]
    rank += query * K
    first = tl.load(starts + slot(chunk, 0, 0, 0, B, S, runs))
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        key = tl.load(indices + k.to(tl.int64) * indices_at[2], mask=k < K, other=-1)
        before = tl.load(starts + slot(chunk, wide, key, run, B, S, runs), mask=key >= 0) - first
        tl.store(rank + k, tl.load(rank + k, mask=key >= 0) + before, mask=key >= 0)


@triton.jit(do_not_specialize=("slot", "runs"))
def add_rows_kernel(
    total, rows, starts, slot, runs, D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr
):
    key = tl.program_id(0).to(tl.int64)
    starts += slot
    first = tl.load(starts)
    start, end = tl.load(starts + key * runs) - first, tl.load(starts + (key + 1) * runs) - first
    if start < end:
        d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        row = tl.arange(0, ROWS)[:, None]
        of_key = rows + start.to(tl.int64) * D + row * D + d[None, :]
        result = tl.zeros([ROWS, FEATURES], tl.float32)
        for i in range(0, end - start, ROWS * PARTS):
            tiles = ()
            for part in tl.static_range(PARTS):
                ahead = i + part * ROWS
                mask = (row + ahead < end - start) & (d < D)[None, :]
                tile = tl.load(of_key + ahead.to(tl.int64) * D, mask=mask, other=0.0)
                tiles = tiles + (tile,)  # type: ignore[assignment]
            for part in tl.static_range(PARTS):
                result += tiles[part].to(tl.float32)
        at = total + key * D + d
        tl.store(at, tl.load(at, mask=d < D, other=0.0) + tl.sum(result, 0), mask=d < D)
