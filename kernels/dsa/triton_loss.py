"""The indexer's loss in Triton, from sm_80 on, for up to 128 heads: operator, launches, sizes.

loss_kernels.py says how the sparse stage goes, warmup_kernels.py how the dense one does. fp32 is true fp32, without
tensor cores, for checks rather than speed. `triton` adds up index_k's gradient by key in one order; `triton_atomic`
adds each pair's row in fp32 where it belongs, in any order, so that bits differ from run to run: sparse stage only, for
the dense one needs no atomics. Where lse isn't given, sparse attention makes it, with an output nobody reads, or
lse_kernel in the dense stage.

Memory beside inputs and gradients. Sparse: 4 bytes a (query, key) pair from forward to backward, 8 in the forward; in
the backward index_k in fp32, and by_key.buffer_bytes. Dense: a buffer of at most by_key.MOST_BYTES (of a
query at least), and in the backward index_k in fp32, several times where it is short.
"""

from __future__ import annotations

import math

import torch
import triton
from torch.autograd.function import once_differentiable

from nam56r.kernels import triton_runtime
from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.dsa import triton as attention
from nam56r.kernels.dsa.by_key import Order, chunks
from nam56r.kernels.dsa.loss_kernels import gradient_kernel, loss_kernel, scores_kernel
from nam56r.kernels.dsa.warmup_kernels import keys_kernel, lse_kernel, queries_kernel, tiles_kernel
from nam56r.kernels.registry import Device, Problem
from nam56r.kernels.triton_runtime import LARGE, block, register_operator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS, INDEX_DIM, DIM = 128, 128, 576  # at most
NARROW = {True: 256, False: 128}  # L + Dr up to which blocks are larger, on Hopper or elsewhere
PROGRAMS = 512  # of keys_kernel, aimed at: heads are split where the keys are too few for them

# scores: (keys of a block, heads of a block at most, warps, stages); tiles: (queries, keys, warps, stages)
SCORES = {"narrow": (64, 32, 4, 3), "wide": (64, 32, 8, 2), "small": (32, 16, 4, 1), "exact": (16, 16, 8, 1)}
TILES = {"narrow": (128, 128, 8, 2), "wide": (64, 64, 8, 2), "small": (32, 32, 4, 1), "exact": (16, 16, 8, 1)}
FEW, MANY = 4096, 8192  # accumulators of a gradient up to which 4 warps do, and 64 keys fit beside them


def refuses(problem: Problem) -> tuple[str, ...]:
    """The reasons why the kernels can't take a problem of `indexer_kl_loss`."""
    reasons = list(triton_runtime.reason(problem))
    for name in ("index_q", "index_weights", "q"):
        if problem[name].dtype not in DTYPES:
            reasons.append(f"{name} is {problem[name].dtype}, but the Triton kernel takes bfloat16, float16 or float32")
    B, S, heads, width = problem["q"].shape
    index_heads, index_dim = problem["index_q"].shape[2:]
    for name, size, most in (("H", heads, HEADS), ("Hi", index_heads, HEADS)):
        if not 1 <= size <= most:
            reasons.append(f"{name} = {size}, but the Triton kernel takes 1 to {most}")
    for name, size, most in (("L + Dr", width, DIM), ("Di", index_dim, INDEX_DIM)):
        if size % 16 or not 16 <= size <= most:
            reasons.append(f"{name} = {size}, but the Triton kernel takes multiples of 16 up to {most}")
    if B * S >= 2**31:
        reasons.append(f"B · S = {B * S}, but the Triton kernel counts up to 2^31 - 1")
    if problem["lse"] is None and problem["indices"] is not None:
        options = {name: problem[name] for name in ("q", "kv", "indices")} | {"value_dim": _value_dim(width)}
        reasons += attention.refuses(Problem.of("sparse_latent_attention", problem.device, **options))
    return tuple(dict.fromkeys(reasons))


def _value_dim(width: int) -> int:
    """A value dim with which attention takes a latent and rope dim of that sum."""
    return width if width <= 128 else width - 64


def _tiles(q, exact):
    """A row of TILES or SCORES, and how q's features are split."""
    width = q.shape[3]
    main = 1 << (width.bit_length() - 1)
    large = Device.of(q.device).capability == LARGE
    tiles = "narrow" if width <= NARROW[large] else "wide" if large else "small"
    sizes = dict(H=q.shape[2], MAIN=main, REST=width - main, BLOCK_REST=block(width - main))
    return "exact" if exact or q.dtype == torch.float32 else tiles, sizes


def _all_lse(q, kv, scale):
    """lse of all keys up to a query."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel():
        (B, S, H, _), q, kv = q.shape, attention.aligned(q), attention.aligned(kv)
        tiles, sizes = _tiles(q, False)
        rows, columns, warps, stages = TILES[tiles]
        with torch.cuda.device_of(q):
            lse_kernel[(triton.cdiv(S, rows) * H * B,)](
                q, kv, lse, q.stride(), kv.stride(), S, scale * math.log2(math.e), ROWS=rows, COLUMNS=columns,
                num_warps=warps, num_stages=stages, **sizes,
            )  # fmt: skip
    return lse


def _lse(q, kv, indices, scale):
    if indices is None:
        return torch.ops.nam56r.dsa_lse_triton(q, kv, scale)
    return attention.sparse_latent_attention(q, kv, indices, value_dim=_value_dim(q.shape[3]), scale=scale)[1]


def _aligned(keys: int) -> int:
    return triton.cdiv(keys, 16) * 16


class _Call:
    """What the launches of one call share: sizes, tiles and, of the forward's, inputs and strides."""

    def __init__(self, index_q, index_k, index_weights, indices, d_loss=None):
        self.B, self.S, self.heads, self.dim = index_q.shape
        self.index = attention.aligned(index_q), attention.aligned(index_k), index_weights
        self.indices, self.d_loss = indices, d_loss
        self.strides = tuple(t.stride() for t in self.index)
        self.exact = index_q.dtype == torch.float32
        self.sizes = dict(HI=self.heads, DI=self.dim, BLOCK_DI=block(self.dim))

    def scores(self, q, kv, lse):
        """How scores_kernel and tiles_kernel are called: a row of TILES or SCORES, tensors, strides, sizes."""
        q, kv = attention.aligned(q), attention.aligned(kv)
        tiles, sizes = _tiles(q, self.exact)
        strides = *self.strides, *(t.stride() for t in (q, kv, lse))
        return tiles, (*self.index, q, kv, lse), strides, sizes | self.sizes

    def gradient(self, rows):
        """Keys of a block, and what a kernel with accumulators for so many rows is compiled with."""
        accumulators = rows * self.sizes["BLOCK_DI"]
        keys = 16 if self.exact else 64 if accumulators <= MANY else 32
        warps, stages = 4 if accumulators <= FEW else 8, 1 if self.exact else 2
        return keys, dict(num_warps=warps, num_stages=stages, **self.sizes)

    def finish(self, target, score, loss, chunk, gradient):
        """The loss of a chunk's queries and, with gradient, dI in score's place."""
        count, keys = chunk.stop - chunk.start, score.shape[2]
        longest = self.S if self.indices is None else keys  # not the chunk's, so that bits don't depend on chunks
        block = min(1024, max(32, triton.next_power_of_2(longest)))  # 32: an entry is one thread's, read and written
        loss_kernel[(self.B * count,)](
            target, score, self.indices, loss, (0, 0, 0) if self.indices is None else self.indices.stride(),
            chunk.start, count, self.S, keys, GRADIENT=gradient, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip


def _sparse(call, q, kv, lse, scale, loss, d_scores):
    """The loss and, in d_scores where it has a size, dI."""
    tiles, tensors, strides, sizes = call.scores(q, kv, lse)
    keys, heads, warps, stages = SCORES[tiles]
    if tiles in ("narrow", "wide") and q.shape[2] <= heads:
        stages = 1  # without a loop over heads, blocks of keys would be kept several times: fewer programs at a time
    target = torch.empty(call.indices.shape, dtype=torch.float32, device=q.device)
    score = d_scores if d_scores.numel() else torch.empty_like(target)
    scores_kernel[(call.B * call.S,)](
        *tensors, call.indices, target, score, *strides, call.indices.stride(), call.S, target.shape[2], scale,
        HEADS=min(block(q.shape[2]), heads), INDEX_HEADS=min(block(call.heads), heads), KEYS=keys,
        num_warps=warps, num_stages=stages, **sizes,
    )  # fmt: skip
    call.finish(target, score, loss, slice(0, call.S), d_scores.numel() > 0)


def _dense(call, q, kv, lse, scale, loss, gradient):
    """The loss, unless it is None; gives each chunk and with gradient its dI."""
    tiles, tensors, strides, sizes = call.scores(q, kv, lse)
    rows, columns, warps, stages = TILES[tiles]
    first, *others = chunks(call.B, call.S, call.S, 8)
    buffer = torch.empty((2, call.B * first.stop * _aligned(call.S)), dtype=torch.float32, device=q.device)
    for chunk in first, *others:  # the first is the longest
        count, width = chunk.stop - chunk.start, _aligned(chunk.stop)
        target, score = buffer[:, : call.B * count * width].view(2, call.B, count, width)
        grid = triton.cdiv(chunk.stop, columns) * triton.cdiv(count, rows) * call.B
        tiles_kernel[(grid,)](
            *tensors, target, score, *strides, chunk.start, count, width, scale, ROWS=rows, COLUMNS=columns,
            num_warps=warps, num_stages=stages, **sizes,
        )  # fmt: skip
        call.finish(target, score, loss, chunk, gradient)
        yield chunk, score


def _outputs(index_q, indices, save):
    """The loss, and dI, which has no element where it isn't kept."""
    kept = indices.shape if save and indices is not None else (0,)
    return tuple(index_q.new_empty(shape, dtype=torch.float32) for shape in (index_q.shape[:2], kept))


def _forward(index_q, index_k, index_weights, q, kv, indices, lse, scale, atomic, save):
    loss, d_scores = _outputs(index_q, indices, save)
    if loss.numel():
        call = _Call(index_q, index_k, index_weights, indices)
        with torch.cuda.device_of(q):
            if indices is not None:
                _sparse(call, q, kv, lse, scale, loss, d_scores)
            else:
                for _ in _dense(call, q, kv, lse, scale, loss, False):
                    pass
    return loss, d_scores


def _gradients(*index):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in index)


def _sparse_backward(call, d_scores, dq, dw, atomic):
    """dq and dw; gives dk in fp32."""
    K = d_scores.shape[2]
    heads = block(call.heads)
    keys, options = call.gradient(heads)
    total = torch.zeros_like(call.index[1], dtype=torch.float32, memory_format=torch.contiguous_format)

    def launch(chunk, rows, position):
        count = chunk.stop - chunk.start
        gradient_kernel[(call.B * count,)](
            call.d_loss, d_scores, *call.index, call.indices, dq, rows, position, dw, call.d_loss.stride(),
            *call.strides, call.indices.stride(), chunk.start, count, call.S, K, HEADS=heads, KEYS=keys, ATOMIC=atomic,
            TURNED=heads < 64 and not call.exact, **options,
        )  # fmt: skip

    if atomic:
        launch(slice(0, call.S), total, None)
        return total
    order = Order(call.indices, call.dim * dq.element_size())
    rows = dq.new_empty((order.pairs, call.dim))
    for i, chunk in enumerate(order.chunks):
        launch(chunk, rows, order.position)
        order.add_rows(total, rows, i)
    return total


def _dense_backward(call, q, kv, lse, scale, dq, dw):
    """dq and dw; gives dk in fp32."""
    block, options = call.gradient(64)
    parts = max(1, min(call.heads, PROGRAMS // (call.B * triton.cdiv(call.S, block))))
    total = torch.zeros((call.B, parts, call.S, call.dim), dtype=torch.float32, device=dq.device)
    strides = call.d_loss.stride(), *call.strides
    options |= dict(ROWS=block, COLUMNS=block)
    for chunk, d_scores in _dense(call, q, kv, lse, scale, None, True):
        count, width = d_scores.shape[1:]
        tensors = call.d_loss, d_scores, *call.index
        queries_kernel[(triton.cdiv(count, block) * call.heads * call.B,)](
            *tensors, dq, dw, *strides, chunk.start, count, call.S, width, **options
        )
        keys_kernel[(triton.cdiv(chunk.stop, block) * parts * call.B,)](
            *tensors, total, *strides, chunk.start, count, call.S, width, parts, **options
        )
    return total.sum(1)


def _backward(d_loss, index_q, index_k, index_weights, d_scores, indices, q, kv, lse, scale, atomic):
    dq, dk, dw = _gradients(index_q, index_k, index_weights)
    if d_loss.numel():
        call = _Call(index_q, index_k, index_weights, indices, d_loss)
        with torch.cuda.device_of(d_loss):
            if indices is None:
                dk.copy_(_dense_backward(call, q, kv, lse, scale, dq, dw))
            else:
                dk.copy_(_sparse_backward(call, d_scores, dq, dw, atomic))
    return dq, dk, dw


def _below_autograd(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nam56r.dsa_loss_triton.default(*inputs)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        loss, d_scores = _below_autograd(*inputs)
        *index, q, kv, indices, lse, scale, atomic, ctx.saved = inputs
        ctx.options = scale, atomic
        again = (q, kv, lse) if indices is None else (None, None, None)
        ctx.save_for_backward(*index, d_scores, indices, *again)
        ctx.mark_non_differentiable(d_scores)
        ctx.set_materialize_grads(False)
        return loss, d_scores

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        if not ctx.saved:
            raise RuntimeError("dsa_loss_triton ran with save=False, so it has no gradient")
        gradients = torch.ops.nam56r.dsa_loss_triton_backward(d_loss, *ctx.saved_tensors, *ctx.options)
        return *gradients, *[None] * 7


def _autograd(*inputs):
    return _Loss.apply(*inputs) if needs_gradient(*inputs) else _below_autograd(*inputs)


register_operator(
    "dsa_lse_triton(Tensor q, Tensor kv, float scale) -> Tensor",
    _all_lse,
    lambda q, kv, scale: q.new_empty(q.shape[:3], dtype=torch.float32),
)
register_operator(
    "dsa_loss_triton(Tensor index_q, Tensor index_k, Tensor index_weights, Tensor q, Tensor kv, Tensor? indices, "
    "Tensor lse, float scale, bool atomic, bool save) -> (Tensor loss, Tensor d_scores)",
    _forward,
    lambda index_q, index_k, index_weights, q, kv, indices, lse, scale, atomic, save: _outputs(index_q, indices, save),
    _autograd,
)
register_operator(
    "dsa_loss_triton_backward(Tensor d_loss, Tensor index_q, Tensor index_k, Tensor index_weights, Tensor d_scores, "
    "Tensor? indices, Tensor? q, Tensor? kv, Tensor? lse, float scale, bool atomic) "
    "-> (Tensor d_index_q, Tensor d_index_k, Tensor d_index_weights)",
    _backward,
    lambda d_loss, *tensors: _gradients(*tensors[:3]),
)


def indexer_kl_loss(index_q, index_k, index_weights, q, kv, indices, lse, *, scale, atomic=False):
    """See `nam56r.kernels.dsa.indexer_kl_loss`; atomic: index_k's gradient in any order."""
    q, kv = q.detach(), kv.detach()
    index = index_q, index_k, index_weights
    lse = _lse(q, kv, indices, scale) if lse is None else lse.detach()
    return torch.ops.nam56r.dsa_loss_triton(*index, q, kv, indices, lse, scale, atomic, needs_gradient(*index))[0]
