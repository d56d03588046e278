"""The binding to csrc/mla: what it takes, shapes for tracing, and the gradients of both forms.

It is made of wgmma and TMA, so it runs on compute capability 9.0 only, from code that the extension holds. The operator
mla_forward serves both forms: absorbed with k = kv, whose first columns are the value, and no k_rope and v.

The denominator is the sum of the weights as the tensor cores multiply them, rounded to 16 bits: lse is within 2^-9
(bf16) or 2^-12 (fp16) of the exact one, and far nearer where several keys share the weight.

Memory: forward keeps out, what its rounding lost, which is as large, and lse. Backward takes 8 bytes a query and head;
absorbed, partial sums of dkv in fp32, 34 MiB or one of dkv's size; expanded, the rope key's gradient of every head in
fp32.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nam56r.kernels import extension
from nam56r.kernels.checks import needs_gradient

DTYPES = (torch.bfloat16, torch.float16)
ABSORBED = ((64, 64),)  # L, Dr
EXPANDED = ((64, 64, 64), (128, 64, 128))  # Dn, Dr, Dv
MOST = 2**30  # rows of a head, or of all heads that share keys, and keys
REGISTERED = extension.has("mla_forward", "mla_backward")


def latent_attention(q, kv, *, value_dim, scale, causal, cu_seqlens, query_offset, return_lse):
    """See `nam56r.kernels.mla.latent_attention`."""
    return _run(q, kv, None, None, cu_seqlens, scale, causal, query_offset, return_lse)


def mla_attention(q, k_nope, k_rope, v, *, scale, causal, cu_seqlens, query_offset, return_lse):
    """See `nam56r.kernels.mla.mla_attention`."""
    return _run(q, k_nope, k_rope, v, cu_seqlens, scale, causal, query_offset, return_lse)


def _run(q, k, k_rope, v, cu_seqlens, scale, causal, query_offset, return_lse):
    inputs, options = (q, k, k_rope, v), (cu_seqlens, scale, causal, query_offset)
    out, lse, _ = torch.ops.nam56r.mla_forward(*inputs, *options, needs_gradient(*inputs))
    return (out, lse) if return_lse else out


def _forward_shapes(q, k, k_rope, v, cu_seqlens, scale, causal, query_offset, save):
    out = q.new_empty((*q.shape[:3], k.shape[-1] // 2 if v is None else v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, lse, out.new_empty((q.shape[0] if save else 0, *out.shape[1:]))


def _save(ctx, inputs, output):
    q, k, k_rope, v, cu_seqlens, *ctx.options, ctx.saved = inputs
    ctx.save_for_backward(q, k, k_rope, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


@once_differentiable
def _backward(ctx, dout, dlse, _):
    if dout is None and dlse is None:
        return (None,) * 9
    if not ctx.saved:
        raise RuntimeError("mla_forward ran with save=False, so it has no gradient")
    q, k, k_rope, v, out, lse, rest, cu_seqlens = ctx.saved_tensors
    inputs = q, k, k_rope, v, out, lse, rest, cu_seqlens
    dq, dk, dk_rope, dv = torch.ops.nam56r.mla_backward(dout, dlse, *inputs, *ctx.options)
    if v is None:
        dk_rope = dv = None
    return dq, dk, dk_rope, dv, *(None,) * 5


def _backward_shapes(dout, dlse, q, k, k_rope, v, out, lse, rest, cu_seqlens, scale, causal, query_offset):
    return tuple(q.new_empty(0 if t is None else t.shape) for t in (q, k, k_rope, v))


if REGISTERED:
    torch.library.register_fake("nam56r::mla_forward", _forward_shapes)
    torch.library.register_fake("nam56r::mla_backward", _backward_shapes)
    torch.library.register_autograd("nam56r::mla_forward", _backward, setup_context=_save)
