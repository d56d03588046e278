"""The binding to csrc/dsa: the indexer's selection.

It is made of wgmma and TMA, so it runs on compute capability 9.0 only, from code that the extension holds.

Memory: indices, and lists of candidates for the queries of a launch, which are as many as have lists of 320 MiB, but at
least those that all processors hold at once; 8 bytes for each of up to 6 top_k + 512 entries. It doesn't grow with S.
`cuda_fp8` has q and k in 8 bits besides.
"""

from __future__ import annotations

import torch

from nam56r.kernels import extension
from nam56r.kernels.dsa.status import flag
from nam56r.kernels.registry import Problem

DTYPES = (torch.bfloat16, torch.float16)
DIMS = (32, 64, 128)
HEADS, TOP_K = 128, 4096
LISTS = 320 * 2**20  # bytes of a launch's lists: kLists of csrc/dsa/dsa.cu
MOST = 2**30  # queries and keys
REGISTERED = extension.has("dsa_index_fp8")


def lists_bytes(queries: int, top_k: int) -> int:
    """About what the lists take: of all queries, or as many as a launch has; more where top_k is in the thousands."""
    return min(8 * (6 * top_k + 512) * queries, LISTS)


def index_top_k(q, k, weights, top_k, *, cu_seqlens):
    """See `nam56r.kernels.dsa.index_top_k`."""
    inputs = (t.detach() for t in (q, k, weights.float()))
    return torch.ops.nam56r.dsa_index(*inputs, top_k, cu_seqlens, flag(q.device))


def index_top_k_fp8(q, k, weights, top_k, *, cu_seqlens):
    """The same of q and k as `reference.rounded_to_e4m3` gives them; products are added up as the tensor cores do in e4m3."""
    inputs = (t.detach() for t in (q, k, weights.float()))
    return torch.ops.nam56r.dsa_index_fp8(*inputs, top_k, cu_seqlens, flag(q.device))


def refuses(problem: Problem) -> tuple[str, ...]:
    """The reasons why the kernel can't take a problem of `index_top_k`."""
    if missing := extension.missing(problem):
        return missing
    if not REGISTERED:
        return ("CUDA extension built from older sources, without the indexer: install the package again",)
    q, reasons = problem["q"], extension.hopper_only(problem)
    if q.dtype not in DTYPES:
        reasons.append(f"q is {q.dtype}, but the CUDA kernel takes bfloat16 or float16")
    B, S, heads, dim = q.shape
    if not 1 <= heads <= HEADS:
        reasons.append(f"Hi = {heads}, but the CUDA kernel takes 1 to {HEADS}")
    if dim not in DIMS:
        reasons.append(f"Di = {dim}, but the CUDA kernel takes {', '.join(map(str, DIMS))}")
    if problem["top_k"] > TOP_K:
        reasons.append(f"top_k = {problem['top_k']}, but the CUDA kernel takes up to {TOP_K}")
    if B * S >= MOST:
        reasons.append(f"B · S = {B * S}, but the CUDA kernel counts up to {MOST - 1}")
    return tuple(reasons)


if REGISTERED:
    for operator in ("dsa_index", "dsa_index_fp8"):
        torch.library.register_fake(
            f"nam56r::{operator}",
            lambda q, k, weights, top_k, cu_seqlens, status: q.new_empty((*q.shape[:2], top_k), dtype=torch.int32),
        )
