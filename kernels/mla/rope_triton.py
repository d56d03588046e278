"""The launches of RoPE's Triton kernels (rope_kernels.py): shapes, tiles, operators with gradients, refusals."""

from __future__ import annotations

import torch
import triton
from torch.autograd.function import once_differentiable

from nam56r.kernels import triton_runtime
from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.mla.rope_kernels import (
    absorb_kernel,
    latents_gradient_kernel,
    latents_kernel,
    turn_kernel,
    up_gradient_kernel,
)
from nam56r.kernels.registry import Problem
from nam56r.kernels.triton_runtime import register_operator

_HALF = (torch.bfloat16, torch.float16)
_SPLITS, _RUN = 256, 8  # up's gradient: programs aimed at, and tiles of tokens that are pipelined together
_PROGRAMS = 512  # of the norms' gradients, each with partial sums of its own


def _products(K: int, N: int, dtype: torch.dtype) -> tuple[tuple[int, int, int], int, int]:
    """Tokens, K and N of a tile of absorb_kernel and up_gradient_kernel; their warps; the stages of the first."""
    if dtype not in _HALF:
        tokens, k, n, warps, stages = 64, 32, 64, 8, 1
    elif max(K, N) <= 64:
        tokens, k, n, warps, stages = 64, 64, 64, 4, 2  # 128 registers: four programs a processor
    else:
        tokens, k, n, warps, stages = 128, 64, 128, 8, 2
    return (tokens, min(k, triton.next_power_of_2(K)), min(n, triton.next_power_of_2(N))), warps, stages


def _rows(count: int, *widths: int) -> tuple[int, int]:
    """How many of count rows of such blocks a program holds, for 32 elements a thread in 4 warps; and its warps."""
    width = triton.next_power_of_2(sum(widths))
    rows = min(64, triton.next_power_of_2(count), max(1, 4096 // width))
    return rows, min(16, max(1, rows * width // 1024))


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _gradient(t: torch.Tensor, width: int, sequence_first: bool) -> torch.Tensor:
    """Where a gradient [B, S, …, width] goes, with t's dtype and other sizes, laid as its activation is."""
    B, S, *heads, _ = t.shape
    if sequence_first:
        return t.new_empty(S, B, *heads, width).transpose(0, 1)
    return t.new_empty(B, S, *heads, width)


def _sequence_first(t: torch.Tensor) -> bool:
    """Whether t [B, S, …] is a [S, B, …], as Megatron's activations are, seen transposed."""
    return t.stride(0) < t.stride(1)


def _turned(x, up, out, cos, sin, positions, interleaved, back):
    """out [B, S, H, .] from x by turn_kernel, or by absorb_kernel with up [H, K, N]."""
    B, S, H, width = x.shape
    P, pairs = cos.shape
    x, half = _dense(x), triton.next_power_of_2(pairs)
    with torch.cuda.device_of(x):
        if up is None:
            nope = width - 2 * pairs
            block = triton.next_power_of_2(max(1, nope))
            heads, warps = _rows(H, block, 2 * half)
            turn_kernel[B * S, triton.cdiv(H, heads)](
                x, out, cos, sin, positions, x.stride(), out.stride(), S, H, P,
                nope, pairs, interleaved, back, heads, block, half, num_warps=warps,
            )  # fmt: skip
        else:
            _, K, N = up.shape
            (tokens, k, n), warps, stages = _products(K, N, x.dtype)
            tiles, heads = triton.cdiv(S, tokens), 4
            absorb_kernel[(B * tiles * triton.cdiv(H, heads),)](
                x, up, out, cos, sin, positions, x.stride(), up.stride(), out.stride(), S, H, P, tiles,
                K, N, pairs, interleaved, back, heads, tokens, k, n, half, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return out


def _queries_shape(q, cos, sin, up, positions, interleaved):
    width = q.shape[3] if up is None else up.shape[2] + 2 * cos.shape[1]
    return q.new_empty(*q.shape[:3], width)


def _queries(q, cos, sin, up, positions, interleaved):
    out = _queries_shape(q, cos, sin, up, positions, interleaved)
    return _turned(q, up, out, cos, sin, positions, interleaved, False) if out.numel() else out


def _queries_gradient_shapes(d_out, q, cos, sin, up, positions, interleaved, sequence_first):
    width = d_out.shape[3] if up is None else up.shape[1] + 2 * cos.shape[1]
    d_q = _gradient(d_out, width, sequence_first)
    return d_q, d_out.new_empty(up.shape) if q is not None else d_out.new_empty(0)


def _queries_gradient(d_out, q, cos, sin, up, positions, interleaved, sequence_first):
    d_q, d_up = _queries_gradient_shapes(d_out, q, cos, sin, up, positions, interleaved, sequence_first)
    if not d_out.numel():
        return d_q, d_up.zero_()
    d_out = _dense(d_out)
    _turned(d_out, None if up is None else up.mT, d_q, cos, sin, positions, interleaved, True)
    if q is None:
        return d_q, d_up
    (B, S, H, _), (_, K, N), q = q.shape, up.shape, _dense(q)
    (_, k, n), warps, _ = _products(K, N, q.dtype)
    tokens = 64
    tiles, columns = triton.cdiv(S, tokens), triton.cdiv(K, k) * triton.cdiv(N, n)
    total = B * tiles
    run = _RUN * triton.cdiv(total, _RUN * triton.cdiv(_SPLITS, H * columns))
    splits = triton.cdiv(total, run)
    partial = d_up.unsqueeze(0) if splits == 1 else q.new_empty(splits, H, K, N, dtype=torch.float32)
    with torch.cuda.device_of(q):
        up_gradient_kernel[H * splits, columns](
            q, d_out, partial, q.stride(), d_out.stride(), S, H, tiles, total, run,
            K, N, _RUN, tokens, k, n, num_warps=warps, num_stages=4,
        )  # fmt: skip
    return d_q, d_up if splits == 1 else partial.sum(0).to(q.dtype)


def _latents_shapes(q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved):
    return kv.new_empty(0 if q_latent is None else q_latent.shape), kv.new_empty(kv.shape)


def _latents_blocks(q_width: int, width: int, pairs: int) -> tuple[tuple[int, int, int, int], int]:
    """Tokens, and columns of q_latent, latent and half the rope key, of a program's tile; its warps."""
    q_block, block, half = (triton.next_power_of_2(max(1, t)) for t in (q_width, width, pairs))
    tokens, warps = _rows(64, q_block, block, 2 * half)
    return (tokens, q_block, block, half), warps


def _latents(q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved):
    q_out, kv_out = _latents_shapes(q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved)
    if not kv.numel():
        return q_out, kv_out
    (B, S, width), (P, pairs) = kv.shape, cos.shape
    q, kv, latent = None if q_latent is None else _dense(q_latent), _dense(kv), width - 2 * pairs
    q_width = 0 if q is None else q.shape[2]
    blocks, warps = _latents_blocks(q_width, latent, pairs)
    tiles = triton.cdiv(S, blocks[0])
    with torch.cuda.device_of(kv):
        latents_kernel[(B * tiles,)](
            q, kv, q_weight, kv_weight, cos, sin, positions, q_out, kv_out,
            (0, 0, 0) if q is None else q.stride(), kv.stride(),
            S, P, tiles, eps, q_width, latent, pairs, interleaved, *blocks, num_warps=warps,
        )  # fmt: skip
    return q_out, kv_out


def _latents_gradient_shapes(
    d_q_out, d_kv_out, q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved, q_first, kv_first
):
    d_q = d_q_out.new_empty(0) if q_latent is None else _gradient(d_q_out, d_q_out.shape[2], q_first)
    weights = (d_q_out.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, kv_weight))
    return d_q, _gradient(d_kv_out, d_kv_out.shape[2], kv_first), *weights


def _latents_gradient(
    d_q_out, d_kv_out, q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved, q_first, kv_first
):
    gradients = _latents_gradient_shapes(
        d_q_out, d_kv_out, q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved, q_first, kv_first
    )
    if not d_kv_out.numel():
        return tuple(t.zero_() for t in gradients)
    d_q, d_kv, d_q_weight, d_kv_weight = gradients
    q, kv = (None if t is None else _dense(t) for t in (q_latent, kv))
    d_q_out, d_kv_out = _dense(d_q_out), _dense(d_kv_out)
    (B, S, width), (P, pairs) = d_kv_out.shape, cos.shape
    q_width, latent = 0 if q is None else q.shape[2], width - 2 * pairs
    blocks, warps = _latents_blocks(q_width, latent, pairs)
    tiles = triton.cdiv(S, blocks[0])
    programs = min(B * tiles, _PROGRAMS)
    partial = d_kv.new_empty(programs, q_width + latent, dtype=torch.float32)
    at = [(0, 0, 0) if t is None or t.ndim != 3 else t.stride() for t in (q, kv, d_q_out, d_kv_out, d_q, d_kv)]
    with torch.cuda.device_of(d_kv):
        latents_gradient_kernel[(programs,)](
            q, kv, q_weight, kv_weight, cos, sin, positions, d_q_out, d_kv_out, d_q, d_kv, partial, *at,
            S, P, tiles, B * tiles, programs, eps, q_width, latent, pairs, interleaved, *blocks, num_warps=warps,
        )  # fmt: skip
    if q_weight is not None:
        d_q_weight.copy_(partial[:, :q_width].sum(0))
    if kv_weight is not None:
        d_kv_weight.copy_(partial[:, q_width:].sum(0))
    return d_q, d_kv, d_q_weight, d_kv_weight


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, cos, sin, up, positions, interleaved):
        ctx.options = interleaved, _sequence_first(q)
        kept = q if up is not None and ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, cos, sin, up, positions)
        return _below("mla_queries", q, cos, sin, up, positions, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        d_q, d_up = torch.ops.nam56r.mla_queries_backward(d_out, *ctx.saved_tensors, *ctx.options)
        return d_q, None, None, d_up if ctx.needs_input_grad[3] else None, None, None


class _Latents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved):
        ctx.options = interleaved, q_latent is not None and _sequence_first(q_latent), _sequence_first(kv)
        ctx.eps = eps
        kept = None if kv_weight is None else kv
        ctx.save_for_backward(q_latent, kept, cos, sin, q_weight, kv_weight, positions)
        return _below("mla_latents", q_latent, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q_out, d_kv_out):
        *tensors, positions = ctx.saved_tensors
        q_latent, _, _, _, q_weight, kv_weight = tensors
        d_q, d_kv, d_q_weight, d_kv_weight = torch.ops.nam56r.mla_latents_backward(
            d_q_out, d_kv_out, *tensors, ctx.eps, positions, *ctx.options
        )
        d_q, d_q_weight = (None if q_weight is None else t for t in (d_q, d_q_weight))
        return d_q, d_kv, None, None, d_q_weight, None if kv_weight is None else d_kv_weight, None, None, None


def _below(operator, *inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.nam56r, operator).default(*inputs)


def _autograd(operator, function):
    def call(*inputs):
        return function.apply(*inputs) if needs_gradient(*inputs) else _below(operator, *inputs)

    return call


register_operator(
    "mla_queries(Tensor q, Tensor cos, Tensor sin, Tensor? up, Tensor? positions, bool interleaved) -> Tensor",
    _queries,
    _queries_shape,
    _autograd("mla_queries", _Queries),
)
register_operator(
    "mla_queries_backward(Tensor d_out, Tensor? q, Tensor cos, Tensor sin, Tensor? up, Tensor? positions, "
    "bool interleaved, bool sequence_first) -> (Tensor d_q, Tensor d_up)",
    _queries_gradient,
    _queries_gradient_shapes,
)
register_operator(
    "mla_latents(Tensor? q_latent, Tensor kv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? kv_weight, float eps, "
    "Tensor? positions, bool interleaved) -> (Tensor q_out, Tensor kv_out)",
    _latents,
    _latents_shapes,
    _autograd("mla_latents", _Latents),
)
register_operator(
    "mla_latents_backward(Tensor d_q_out, Tensor d_kv_out, Tensor? q_latent, Tensor? kv, Tensor cos, Tensor sin, "
    "Tensor? q_weight, Tensor? kv_weight, float eps, Tensor? positions, bool interleaved, bool q_first, bool kv_first) "
    "-> (Tensor d_q, Tensor d_kv, Tensor d_q_weight, Tensor d_kv_weight)",
    _latents_gradient,
    _latents_gradient_shapes,
)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def mla_queries(q, cos, sin, *, up=None, positions=None, interleaved=True):
    """See `nam56r.kernels.mla.mla_queries`."""
    cos, sin, positions = _contiguous(cos, sin, positions)
    return torch.ops.nam56r.mla_queries(q, cos, sin, up, positions, interleaved)


def mla_latents(q_latent, kv, cos, sin, *, q_weight=None, kv_weight=None, eps=1e-6, positions=None, interleaved=True):
    """See `nam56r.kernels.mla.mla_latents`."""
    cos, sin, positions, q_weight, kv_weight = _contiguous(cos, sin, positions, q_weight, kv_weight)
    normed = None if q_weight is None else q_latent
    q_out, kv_out = torch.ops.nam56r.mla_latents(normed, kv, cos, sin, q_weight, kv_weight, eps, positions, interleaved)
    return q_latent if normed is None else q_out, kv_out


def queries_refuses(problem: Problem) -> tuple[str, ...]:
    """Why mla_queries can't run here."""
    q, up, rope = problem["q"], problem["up"], 2 * problem["cos"].shape[1]
    reasons = [*triton_runtime.reason(problem), *_double("q", q.dtype)]
    if up is not None:
        for name, size in (("Dn", up.shape[1]), ("L", up.shape[2]), ("Dr", rope)):
            if size % 16 or not 16 <= size <= 1024:
                reasons.append(f"{name} = {size}, but with up the Triton kernel takes multiples of 16 up to 1024")
    elif q.shape[3] > 4096:
        reasons.append(f"Dn + Dr = {q.shape[3]}, but the Triton kernel takes up to 4096")
    return tuple(reasons)


def latents_refuses(problem: Problem) -> tuple[str, ...]:
    """Why mla_latents can't run here."""
    kv, q_latent = problem["kv"], problem["q_latent"]
    reasons = [*triton_runtime.reason(problem), *_double("kv", kv.dtype)]
    for name, spec in (("L + Dr", kv), ("Lq", q_latent)):
        if spec is not None and spec.shape[2] > 8192:
            reasons.append(f"{name} = {spec.shape[2]}, but the Triton kernel takes up to 8192")
    return tuple(reasons)


def _double(name: str, dtype: torch.dtype) -> tuple[str, ...]:
    if dtype != torch.float64:
        return ()
    return (f"{name} is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",)
