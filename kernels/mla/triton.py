"""Latent and expanded attention in Triton, from sm_80 on, for any head dims up to 512: operators, launches, sizes.

One set of kernels serves both forms (triton_forward.py and triton_backward.py say how); no key or value is expanded or
concatenated in memory. fp32 is true fp32, without tensor cores, for checks rather than speed. Packed sequences are one
long row, of which each token knows where its sequence begins and ends.

Memory beside inputs, outputs and gradients: 4 bytes a row (head and token) for exponent, and in 16 bits as much as out
for what its rounding lost; in the backward as much as exponent for delta; and where the gradient of what all heads
share is made in several parts, these in fp32: latent, parts · B · T · (L + Dr), for short inputs only; expanded,
parts · B · T · Dr, one part for every EACH heads, EACH as large as leaves each processor four programs. The number of
parts is decided from shapes and the device's number of processors, so bits repeat on one kind of device.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch.autograd.function import once_differentiable

from nam56r.kernels import triton_runtime
from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.mla.triton_backward import delta_kernel, keys_kernel, queries_kernel
from nam56r.kernels.mla.triton_forward import forward_kernel
from nam56r.kernels.registry import Device, Problem
from nam56r.kernels.triton_runtime import LARGE, SMALL, block, register_operator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROW, WIDEST = 128, 512  # nope and value dims: up to 128, and up to 512, where the features of dk and dv are halved
ROPE = {NARROW: 128, WIDEST: 64}  # the largest rope dim beside them
LEAST = 4  # blocks of rows that a part of a sum over rows has
AT_ONCE = 4  # programs for each processor

# (rows, keys of a block, warps, stages) of (forward, queries, keys)
TILES = {
    (NARROW, True): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (NARROW, False): ((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (WIDEST, True): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2)),
    (WIDEST, False): ((32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2)),
}
EXACT = ((16, 16, 8, 1),) * 3  # fp32: multiply and add, without tensor cores


def tiles(dtype: torch.dtype, width: int, large: bool) -> tuple[tuple[int, int, int, int], ...]:
    """(rows, keys of a block, warps, stages) of forward, queries and keys; width is NARROW or WIDEST."""
    return EXACT if dtype == torch.float32 else TILES[width, large]


def width_of(nope: int, value: int) -> int:
    """NARROW or WIDEST."""
    return NARROW if max(nope, value) <= NARROW else WIDEST


def latent_refuses(problem: Problem) -> tuple[str, ...]:
    """The reasons why the kernels can't take a problem of `latent_attention`."""
    value_dim = problem["value_dim"]
    return _refusal(problem, value_dim, problem["q"].shape[3] - value_dim, value_dim)


def mla_refuses(problem: Problem) -> tuple[str, ...]:
    """The reasons why the kernels can't take a problem of `mla_attention`."""
    nope, rope, value = (problem[name].shape[-1] for name in ("k_nope", "k_rope", "v"))
    return _refusal(problem, nope, rope, value)


def _refusal(problem: Problem, nope: int, rope: int, value: int) -> tuple[str, ...]:
    reasons, dtype = list(triton_runtime.reason(problem)), problem["q"].dtype
    if dtype not in DTYPES:
        reasons.append(f"q is {dtype}, but the Triton kernel takes bfloat16, float16 or float32")
    width = width_of(nope, value)
    limits = ("nope", nope, 1, WIDEST), ("rope", rope, 0, ROPE[width]), ("value", value, 1, WIDEST)
    for name, size, least, most in limits:
        if not least <= size <= most:
            beside = f" beside {nope} and {value}" if name == "rope" else ""
            reasons.append(f"the {name} dim is {size}, but the Triton kernel takes {least} to {most}{beside}")
    if problem.device.capability in SMALL and width == WIDEST:
        if dtype == torch.float32:
            reasons.append(
                f"{problem.device.name} has 99 KiB of shared memory a block, too little for float32 with dims over "
                f"{NARROW}, here {max(nope, value)}"
            )
        elif problem.operator == "mla_attention" and max(nope, value) > 256:
            reasons.append(
                f"{problem.device.name} has 99 KiB of shared memory a block, too little for expanded dims over 256, "
                f"here {max(nope, value)}"
            )
    _, S, H, _ = problem["q"].shape
    if S * H > 2**30:
        reasons.append(f"S · H = {S * H}, but the Triton kernel takes up to 2^30")
    return tuple(reasons)


def _bounds(cu_seqlens: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[2, S] int32: where each token's sequence begins, and its end."""
    if cu_seqlens is None:
        return None
    token = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    # cu_seqlens as it is: Inductor can't search in a slice of what it makes itself
    after = torch.bucketize(token, cu_seqlens, right=True).clamp(1, cu_seqlens.numel() - 1)
    # clamped, so that values that nobody checks on CUDA never lead out of memory
    return cu_seqlens[torch.stack((after - 1, after))].clamp(max=length)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Call:
    """What the launches of one call share. Latent: k is kv [B, T, L + Dr], k_rope and v are None."""

    def __init__(self, q, k, k_rope, v, bounds, value_dim, causal, query_offset):
        self.latent = v is None
        self.B, self.S, self.H, dim = q.shape
        self.T, self.heads = k.shape[1], self.H if self.latent else 1
        nope = value_dim if self.latent else k.shape[-1]
        self.dims = nope, dim - nope, value_dim
        width = width_of(nope, value_dim)
        large = Device.of(q.device).capability == LARGE and (self.latent or max(nope, value_dim) <= 256)
        self.tiles = tiles(q.dtype, width, large)
        self.halves = 2 if width == WIDEST else 1
        if self.latent:
            k_rope = k[..., nope:] if dim > nope else k
            k = v = k.unsqueeze(2)  # one head
        self.inputs = q, k, k_rope, v
        self.strides = tuple(t.stride() for t in self.inputs)
        self.bounds, self.sizes = bounds, (self.S, self.T, query_offset)
        self.constants = self.H, *self.dims, self.heads, self.latent, causal

    def options(self, kernel: int) -> dict:
        rows, columns, warps, stages = self.tiles[kernel]
        nope, rope, value = map(block, self.dims)
        halves = {}
        if kernel == 2:
            halves = dict(HALVES=self.halves)
            nope, value = max(16, nope // self.halves), max(16, value // self.halves)
        return dict(
            ROWS=rows, COLUMNS=columns, BLOCK_DN=nope, BLOCK_DR=rope, BLOCK_DV=value, num_warps=warps,
            num_stages=stages, **halves,
        )  # fmt: skip

    def grid(self, kernel: int) -> tuple[int]:
        """One program for each tile of rows, group of heads, and sequence."""
        return (triton.cdiv(self.S * self.heads, self.tiles[kernel][0]) * (self.H // self.heads) * self.B,)

    def parts(self) -> tuple[int, int]:
        """In how many parts the gradient of what heads share is made, and how many heads a program takes, in turn."""
        rows, columns, _, _ = self.tiles[2]
        programs = triton.cdiv(self.T, columns) * self.B * self.halves
        wanted = triton.cdiv(AT_ONCE * _processors(self.inputs[0].device), programs)
        if self.latent:
            return max(1, min(wanted, triton.cdiv(self.S * self.H, rows) // LEAST)), 1
        each = max(n for n in range(1, self.H + 1) if self.H % n == 0 and (n == 1 or self.H // n >= wanted))
        return self.H // each, each


def _outputs(q, value_dim, save):
    """out, lse, exponent (see triton_forward.py), and what out's rounding lost, with no rows where it isn't kept."""
    out, lse = q.new_empty((*q.shape[:3], value_dim)), q.new_empty(q.shape[:3], dtype=torch.float32)
    rest = q.new_empty((q.shape[0] if save and q.dtype != torch.float32 else 0, *out.shape[1:]))
    return out, lse, torch.empty_like(lse), rest


def _forward(q, k, k_rope, v, bounds, value_dim, scale, causal, query_offset, save):
    outputs = _outputs(q, value_dim, save)
    if q.numel():
        call = _Call(q, k, k_rope, v, bounds, value_dim, causal, query_offset)
        with torch.cuda.device_of(q):
            forward_kernel[call.grid(0)](
                *call.inputs, *outputs[:3], _kept(outputs[3]), bounds, *call.strides, *call.sizes,
                scale * math.log2(math.e), *call.constants, **call.options(0),
            )  # fmt: skip
    return outputs


def _kept(rest):
    return rest if rest.shape[0] else None


def _gradients(q, k, k_rope, v):
    """Those of q, k, k_rope and v, unwritten; [0] for what is None."""
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (q, k, k_rope, v)
    )


def _backward(dout, dlse, q, k, k_rope, v, out, exponent, rest, bounds, value_dim, scale, causal, query_offset):
    gradients = _gradients(q, k, k_rope, v)
    if not q.numel() or not k.shape[1]:
        return tuple(t.zero_() for t in gradients)
    dq, dk, dk_rope, dv = gradients
    call = _Call(q, k, k_rope, v, bounds, value_dim, causal, query_offset)
    delta = torch.empty_like(exponent)
    factors = scale, scale * math.log2(math.e)
    parts, each = call.parts()
    whole = dk if call.latent else dk_rope  # what all heads share
    shared = whole if parts == 1 else q.new_empty((parts, *whole.shape), dtype=torch.float32)
    targets = (shared, shared, shared) if call.latent else (dk, shared, dv)
    given = q.new_zeros(()).expand(out.shape) if dout is None else dout
    with torch.cuda.device_of(q):
        value = block(value_dim)
        rows = 4096 // value
        delta_kernel[(triton.cdiv(exponent.numel(), rows),)](
            dout, dlse, out, _kept(rest), exponent, delta, given.stride(), (0, 0, 0) if dlse is None else dlse.stride(),
            call.S, exponent.numel(), call.H, value_dim, call.heads, rows, value, num_warps=4,
        )  # fmt: skip
        queries_kernel[call.grid(1)](
            *call.inputs, given, exponent, delta, dq, bounds, *call.strides, given.stride(), *call.sizes, *factors,
            *call.constants, **call.options(1),
        )  # fmt: skip
        columns = triton.cdiv(call.T, call.tiles[2][1])
        keys_kernel[(columns * parts * call.B * call.halves,)](
            *call.inputs, given, exponent, delta, *targets, bounds, *call.strides, given.stride(), *call.sizes,
            *factors, call.B, parts, each, *call.constants, **call.options(2),
        )  # fmt: skip
    if parts > 1:
        whole.copy_(shared.sum(0))
    return gradients


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        out, lse, exponent, rest = _below_autograd(*inputs)
        q, k, k_rope, v, bounds, *ctx.options, ctx.saved = inputs
        ctx.save_for_backward(q, k, k_rope, v, out, exponent, rest, bounds)
        ctx.mark_non_differentiable(exponent, rest)
        ctx.given = [t is not None for t in (q, k, k_rope, v)]
        ctx.set_materialize_grads(False)
        return out, lse, exponent, rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse, *_):
        if not ctx.saved:
            raise RuntimeError("mla_triton ran with save=False, so it has no gradient")
        gradients = torch.ops.nam56r.mla_triton_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *(t if there else None for t, there in zip(gradients, ctx.given)), *[None] * 6


def _below_autograd(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nam56r.mla_triton.default(*inputs)


register_operator(
    "mla_triton(Tensor q, Tensor k, Tensor? k_rope, Tensor? v, Tensor? bounds, int value_dim, float scale, "
    "bool causal, int query_offset, bool save) -> (Tensor out, Tensor lse, Tensor exponent, Tensor rest)",
    _forward,
    lambda q, k, k_rope, v, bounds, value_dim, scale, causal, query_offset, save: _outputs(q, value_dim, save),
    lambda *inputs: _Attention.apply(*inputs),
)
register_operator(
    "mla_triton_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor? k_rope, Tensor? v, Tensor out, "
    "Tensor exponent, Tensor rest, Tensor? bounds, int value_dim, float scale, bool causal, int query_offset) "
    "-> (Tensor dq, Tensor dk, Tensor dk_rope, Tensor dv)",
    _backward,
    lambda dout, dlse, q, k, k_rope, v, *_: _gradients(q, k, k_rope, v),
)


def latent_attention(q, kv, *, value_dim, scale, causal=True, cu_seqlens=None, query_offset=0, return_lse=False):
    """See `nam56r.kernels.mla.latent_attention`."""
    return _run(q, kv, None, None, cu_seqlens, value_dim, scale, causal, query_offset, return_lse)


def mla_attention(q, k_nope, k_rope, v, *, scale, causal=True, cu_seqlens=None, query_offset=0, return_lse=False):
    """See `nam56r.kernels.mla.mla_attention`."""
    return _run(q, k_nope, k_rope, v, cu_seqlens, v.shape[3], scale, causal, query_offset, return_lse)


def _run(q, k, k_rope, v, cu_seqlens, value_dim, scale, causal, query_offset, return_lse):
    inputs, bounds = (q, k, k_rope, v), _bounds(cu_seqlens, q.shape[1])
    options = value_dim, scale, causal, query_offset
    out, lse, *_ = torch.ops.nam56r.mla_triton(*inputs, bounds, *options, needs_gradient(*inputs))
    return (out, lse) if return_lse else out
