"""What follows the scan in an R layer: the skip of v and the gate, in plain PyTorch with its backward written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def skip_and_gate(y: torch.Tensor, v: torch.Tensor, D: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(y + D ⊙ v) × SiLU(g) in fp32 (arXiv 2603.14360): y, v [S, B, N, V] of any strides, D [N] fp32, g [S, B, N·V].

    Returns [S, B, N·V], contiguous, in g's dtype. Keeps its inputs alone for the backward; autograd's own form would keep
    three fp32 tensors more. Each gradient has its input's strides. In units of one bf16 tensor of S·B·N·V, forward moves
    16 in 4 passes and backward 39 in 10; one kernel each would move 4 and 7.
    """
    return _SkipAndGate.apply(y, v, D, g)


class _SkipAndGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, v, D, g):
        ctx.save_for_backward(y, v, D, g)
        return torch.mul(_skip(y, v, D), F.silu(_wide(g)), out=torch.empty_like(g))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, v, D, g = ctx.saved_tensors
        gate = _wide(g)
        dsilu = _skip(y, v, D).mul_(dout)
        dg = torch.ops.aten.silu_backward.grad_input(dsilu, gate, grad_input=torch.empty_like(g))
        dskip = F.silu(gate).mul_(dout).view(y.shape)
        dy = torch.empty_like(y).copy_(dskip)
        dv = torch.mul(dskip, D[:, None], out=torch.empty_like(v))
        return dy, dv, dskip.mul_(v).sum((0, 1, 3)).to(D.dtype), dg


def _skip(y: torch.Tensor, v: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """y + D ⊙ v [S, B, N·V] in D's fp32 or more, without wide copies of y and v."""
    return torch.addcmul(y, v, D[:, None]).flatten(2)


def _wide(g: torch.Tensor) -> torch.Tensor:
    return g.to(torch.promote_types(g.dtype, torch.float32))
