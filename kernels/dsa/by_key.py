"""What every (query, key) pair adds to its key, summed in one order: the gradient of keys that queries select.

A kernel writes one row for each pair of a chunk of queries, in natural order; `order` sorts the pairs by key, and
`add_rows` adds each key's rows, by query, into a total in fp32. No atomics: the same bits every time. Nothing is read
by the host, so all of it can be captured in a graph.

    for chunk in chunks(B, S, K, row_bytes):
        rows = ...                                        [B · C · K, D], row (b · C + c) · K + k of pair (b, c, k)
        add_rows(total, rows, *order(indices[:, chunk], S))

add_rows: a program a key and block of features; rows are gathered ROWS at a time and added ROWS apart, then the ROWS
sums together. It is bound by memory: every row is read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

MOST_BYTES = 256 * 2**20  # of a chunk's rows
SORTING = 40  # bytes that `order` takes for a pair, about
TILE = 8192  # elements that a program loads at a time


def chunks(batch: int, queries: int, top_k: int, row_bytes: int) -> Iterator[slice]:
    """Slices of the queries, of nearly one size, with at most MOST_BYTES of rows (or one query each)."""
    most = max(1, MOST_BYTES // max(1, batch * top_k * row_bytes))
    each = triton.cdiv(queries, triton.cdiv(queries, most)) if queries else 1
    return (slice(start, min(start + each, queries)) for start in range(0, queries, each))


def buffer_bytes(queries: int, top_k: int, row_bytes: int) -> int:
    """The rows of the largest chunk, of all sequences' queries, and what sorts its pairs."""
    pairs = min(queries * top_k, max(top_k, MOST_BYTES // max(1, row_bytes)))
    return pairs * (row_bytes + SORTING)


def order(indices: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of indices [B, C, K] (-1: none), sorted by key, and by query where keys are equal.

    Returns pairs [B · C · K] int64, the flat positions in indices, and starts [B · length + 1] int64: the pairs of key
    s of sequence b are pairs[starts[b · length + s] : starts[b · length + s + 1]]. Behind them all are those without a
    key. B · length is up to 2^31 - 1.
    """
    batch = indices.shape[0]
    device, none = indices.device, batch * length
    first = torch.arange(batch, dtype=torch.int32, device=device).mul_(length)
    key = (indices + first[:, None, None]).masked_fill_(indices < 0, none)
    key, pairs = key.flatten().sort(stable=True)
    return pairs, torch.searchsorted(key, torch.arange(none + 1, dtype=torch.int32, device=device))


def add_rows(total: torch.Tensor, rows: torch.Tensor, pairs: torch.Tensor, starts: torch.Tensor) -> None:
    """total [B, S, D] (fp32, contiguous) += every key's rows [B · C · K, D] (any float, contiguous), as ordered.

    D is any width. Rows of pairs without a key are not read.
    """
    width = total.shape[-1]
    features = min(128, max(16, triton.next_power_of_2(width)))
    keys = total.numel() // max(width, 1)
    if keys and rows.numel():
        with torch.cuda.device_of(total):
            add_rows_kernel[(keys, triton.cdiv(width, features))](
                total, rows, pairs, starts, width, TILE // features, features, num_warps=4
            )


@triton.jit
def add_rows_kernel(total, rows, pairs, starts, D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    key = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + key), tl.load(starts + key + 1)
    if start < end:
        d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        there = d < D
        result = tl.zeros([ROWS, FEATURES], tl.float32)
        for i in range(start, end, ROWS):
            at = i + tl.arange(0, ROWS)
            inside = at < end
            pair = tl.load(pairs + at, mask=inside, other=0)
            at = rows + pair[:, None] * D + d[None, :]
            result += tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
        at = total + key * D + d
        tl.store(at, tl.load(at, mask=there, other=0.0) + tl.sum(result, 0), mask=there)
