"""Sparse absorbed attention in Triton, from sm_80 on, for latents up to 512 in steps of 16: operator, launches, sizes.

attention_kernels.py says how; no key is gathered or expanded in memory. fp32 is true fp32, without tensor cores, for
checks rather than speed.

Every (query, key) pair has a row of kv's gradient. `triton` writes the rows of a chunk of queries to a buffer, in the
order of their keys, and adds them up (by_key.py); `triton_atomic` adds them in fp32 where they belong, in any order, so
that bits differ from run to run, and needs no buffer.

Memory beside inputs, outputs and gradients: 4 bytes a head and query for exponent, and in 16 bits as much as out for
what its rounding lost; in the backward kv in fp32, by_key.buffer_bytes, and as much as exponent for delta where the
heads aren't one block. In both a copy of what `aligned` has to copy.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from nam56r.kernels import triton_runtime
from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.dsa.attention_kernels import backward_kernel, forward_kernel, rows_kernel
from nam56r.kernels.dsa.by_key import Order
from nam56r.kernels.registry import Device, Problem
from nam56r.kernels.triton_runtime import LARGE, SMALL, block, register_operator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROW, WIDEST = 128, 512  # latents up to 128, and up to 512
ROPE = {NARROW: 128, WIDEST: 64}  # the largest rope dim beside them
FEW = 32  # heads

# (keys of a block, most heads of a block, warps, stages) of (forward, backward, rows). Warps of Hopper's products have
# 16 rows each, of keys: more warps than keys / 16 make the same scores twice, as WIDEST's forward does for registers.
TILES = {
    (NARROW, True): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (NARROW, False): ((32, 32, 4, 2),) * 3,
    (WIDEST, True): ((64, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2)),
    (WIDEST, False): ((32, 16, 8, 1),) * 3,
}
FEW_TILES = ((64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 3))  # of NARROW, large
EXACT = ((16, 16, 8, 1),) * 3  # fp32: multiply and add, without tensor cores
ACCUMULATORS = 128  # of dq and of a block's rows, a thread: up to so many one kernel makes both


def refuses(problem: Problem) -> tuple[str, ...]:
    """The reasons why the kernels can't take a problem of `sparse_latent_attention`."""
    reasons, dtype = list(triton_runtime.reason(problem)), problem["q"].dtype
    if dtype not in DTYPES:
        reasons.append(f"q is {dtype}, but the Triton kernel takes bfloat16, float16 or float32")
    B, S, H, width = problem["q"].shape
    latent, K = problem["value_dim"], problem["indices"].shape[2]
    limits = ("latent", latent, 16, WIDEST), ("rope", width - latent, 0, ROPE[_width(latent)])
    for name, size, least, most in limits:
        if size % 16 or not least <= size <= most:
            beside = f" beside {latent}" if name == "rope" else ""
            what = f"takes multiples of 16 from {least} to {most}{beside}"
            reasons.append(f"the {name} dim is {size}, but the Triton kernel {what}")
    if problem.device.capability in SMALL and dtype == torch.float32 and latent > NARROW:
        reasons.append(
            f"{problem.device.name} has 99 KiB of shared memory a block, too little for float32 with a latent over "
            f"{NARROW}, here {latent}"
        )
    if B * S * max(H, K, 16) > 2**34:
        reasons.append(f"B · S · max(H, K, 16) = {B * S * max(H, K, 16)}, but the Triton kernel takes up to 2^34")
    return tuple(reasons)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """rows [..., D], or a copy of them, if not every row is D features side by side that begin where 16 bytes may.

    Triton loads other rows element by element, without a pipeline. Beside being slow, that has met an error of ptxas
    12.8, which Triton 3.6 brings along: where one place in shared memory was two kinds of operand in turn, it left a
    register of the second's address unset, and out was wrong.
    """
    near = rows.stride(-1) == 1 and all(stride % 16 == 0 for stride in rows.stride()[:-1])
    return rows if near and rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def _width(latent: int) -> int:
    return NARROW if latent <= NARROW else WIDEST


def tiles(dtype: torch.dtype, heads: int, latent: int, large: bool) -> tuple[tuple[int, int, int, int], ...]:
    """(keys of a block, most heads of a block, warps, stages) of forward, backward and rows."""
    if dtype == torch.float32:
        return EXACT
    if heads <= FEW and latent <= NARROW and large:
        return FEW_TILES
    return TILES[_width(latent), large]


class _Launches(NamedTuple):
    """What launches are compiled with (forward, backward, rows), how many blocks of heads forward and backward have,
    and whether one backward makes dq and rows."""

    options: tuple[dict, ...]
    blocks: tuple[int, ...]
    one: bool


@functools.cache
def _launches(dtype: torch.dtype, heads: int, latent: int, rope: int, large: bool) -> _Launches:
    forward, backward, rows = (
        dict(
            H=heads, L=latent, DR=rope, BLOCK_L=block(latent), BLOCK_DR=block(rope), HEADS=min(block(heads), most),
            KEYS=keys, num_warps=warps, num_stages=stages,
        )
        for keys, most, warps, stages in tiles(dtype, heads, latent, large)
    )  # fmt: skip
    halves = 1 if latent <= NARROW else 2  # registers of a program of rows have room for 256 features
    rows.update(HALVES=halves, BLOCK_L=block(latent) // halves)
    blocks = tuple(triton.cdiv(heads, o["HEADS"]) for o in (forward, backward))
    accumulators = (backward["HEADS"] + backward["KEYS"]) * (block(latent) + block(rope))
    few = halves == 1 and accumulators <= ACCUMULATORS * 32 * backward["num_warps"]
    return _Launches((forward, backward, rows), blocks, blocks[1] == 1 and few)


def _launches_of(q, value_dim):
    large = Device.of(q.device).capability == LARGE
    return _launches(q.dtype, q.shape[2], value_dim, q.shape[3] - value_dim, large)


def _outputs(q, value_dim, save):
    """out, lse, exponent (see attention_kernels.py), and what out's rounding lost, with no rows where it isn't kept."""
    out, lse = q.new_empty((*q.shape[:3], value_dim)), q.new_empty(q.shape[:3], dtype=torch.float32)
    rest = q.new_empty((q.shape[0] if save and q.dtype != torch.float32 else 0, *out.shape[1:]))
    return out, lse, torch.empty_like(lse), rest


def _kept(rest):
    return rest if rest.shape[0] else None


def _forward(q, kv, indices, value_dim, scale, save, atomic):
    out, lse, exponent, rest = _outputs(q, value_dim, save)
    if q.numel():
        launches = _launches_of(q, value_dim)
        (B, S, _, _), q, kv = q.shape, aligned(q), aligned(kv)
        with torch.cuda.device_of(q):
            forward_kernel[(B * S * launches.blocks[0],)](
                q, kv, indices, out, lse, exponent, _kept(rest), q.stride(), kv.stride(), indices.stride(),
                S, indices.shape[2], scale * math.log2(math.e), **launches.options[0],
            )  # fmt: skip
    return out, lse, exponent, rest


def _gradients(q, kv):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, kv))


def _backward(dout, q, kv, indices, out, exponent, rest, value_dim, scale, atomic):
    dq, dkv = _gradients(q, kv)
    if not q.numel() or not indices.numel():
        return dq.zero_(), dkv.zero_()
    launches = _launches_of(q, value_dim)
    _, backward, each_row = launches.options
    (B, S, _, width), K = q.shape, indices.shape[2]
    dout, q, kv = aligned(dout), aligned(q), aligned(kv)
    total = torch.zeros_like(dkv, dtype=torch.float32)
    delta = None if launches.one else torch.empty_like(exponent)
    strides = q.stride(), kv.stride(), indices.stride(), dout.stride()
    factors = scale, scale * math.log2(math.e)

    def to_queries(first, count, rows, position):
        backward_kernel[(B * count * launches.blocks[1],)](
            q, kv, indices, dout, out, _kept(rest), exponent, delta, dq, rows, position, *strides, first, count, S, K,
            *factors, ATOMIC=atomic, **backward,
        )  # fmt: skip

    def to_keys(first, count, rows, position):
        if launches.one:
            to_queries(first, count, rows, position)
            return
        rows_kernel[(B * count * triton.cdiv(K, each_row["KEYS"]) * each_row["HALVES"],)](
            q, kv, indices, dout, exponent, delta, rows, position, *strides, first, count, S, K, *factors,
            ATOMIC=atomic, **each_row,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if not launches.one:
            to_queries(0, S, None, None)
        if atomic:
            to_keys(0, S, total, None)
        else:
            order = Order(indices, width * q.element_size())
            rows = q.new_empty((order.pairs, width))
            for i, chunk in enumerate(order.chunks):
                to_keys(chunk.start, chunk.stop - chunk.start, rows, order.position)
                order.add_rows(total, rows, i)
    return dq, dkv.copy_(total)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, exponent, rest = torch.ops.nam56r.dsa_attention_triton.default(*inputs)
        q, kv, indices, *ctx.options, ctx.saved, ctx.atomic = inputs
        ctx.save_for_backward(q, kv, indices, out, exponent, rest)
        ctx.mark_non_differentiable(lse, exponent, rest)
        ctx.set_materialize_grads(False)
        return out, lse, exponent, rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        if not ctx.saved:
            raise RuntimeError("dsa_attention_triton ran with save=False, so it has no gradient")
        backward = torch.ops.nam56r.dsa_attention_triton_backward
        return *backward(dout, *ctx.saved_tensors, *ctx.options, ctx.atomic), *[None] * 5


register_operator(
    "dsa_attention_triton(Tensor q, Tensor kv, Tensor indices, int value_dim, float scale, bool save, bool atomic) "
    "-> (Tensor out, Tensor lse, Tensor exponent, Tensor rest)",
    _forward,
    lambda q, kv, indices, value_dim, scale, save, atomic: _outputs(q, value_dim, save),
    lambda *inputs: _Attention.apply(*inputs),
)
register_operator(
    "dsa_attention_triton_backward(Tensor dout, Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor exponent, "
    "Tensor rest, int value_dim, float scale, bool atomic) -> (Tensor dq, Tensor dkv)",
    _backward,
    lambda dout, q, kv, *_: _gradients(q, kv),
)


def sparse_latent_attention(q, kv, indices, *, value_dim, scale, atomic=False):
    """See `nam56r.kernels.dsa.sparse_latent_attention`; atomic: kv's gradient in any order."""
    save = needs_gradient(q, kv)
    out, lse, *_ = torch.ops.nam56r.dsa_attention_triton(q, kv, indices, value_dim, scale, save, atomic)
    return out, lse
