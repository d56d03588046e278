"""The binding to csrc/conv1d: shapes for tracing, and the gradient."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nam56r.kernels import extension

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nam56r.kernels.conv1d.causal_conv1d`."""
    silu = activation == "silu"
    return torch.ops.nam56r.causal_conv1d_forward(x, weight, bias, initial_state, cu_seqlens, silu)


def _forward_shapes(x, weight, bias, initial_state, cu_seqlens, silu):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


def _backward_shapes(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    dbias, dinitial_state = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, initial_state))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, dy, dfinal_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, dweight, dbias, dinitial_state = torch.ops.nam56r.causal_conv1d_backward(
        dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    dbias, dinitial_state = None if bias is None else dbias, None if initial_state is None else dinitial_state
    return dx, dweight, dbias, dinitial_state, None, None


REGISTERED = extension.has("causal_conv1d_forward", "causal_conv1d_backward")

if REGISTERED:
    torch.library.register_fake("nam56r::causal_conv1d_forward", _forward_shapes)
    torch.library.register_fake("nam56r::causal_conv1d_backward", _backward_shapes)
    torch.library.register_autograd("nam56r::causal_conv1d_forward", _backward, setup_context=_save)
