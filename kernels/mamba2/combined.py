"""What layers written for mamba-ssm's Mamba-2 call, as Megatron's MambaMixer is: its scan's signature, its norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nam56r.kernels.mamba2 import mamba2_scan


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    kernel: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined on `mamba2_scan`: shapes are that operator's.

    chunk_size and state_dtype change no result but its rounding there; ours chooses chunks itself and carries states in
    fp32. cu_seqlens are the packed sequences' bounds, which mamba-ssm takes as seq_idx; initial_states has a row for
    each of them. kernel is a name from the registry.
    Returns y, or (y, the final states) with return_final_states. Raises ValueError, naming all of them, for arguments
    that have no counterpart, and what `mamba2_scan` raises.
    """
    refused = []
    if seq_idx is not None:
        refused.append("seq_idx is given, but sequences are packed by their bounds: give cu_seqlens instead")
    if tuple(dt_limit) != (0.0, math.inf):
        refused.append(f"dt_limit is {tuple(dt_limit)}, but must be (0.0, inf): clamp dt before, without dt_softplus")
    if return_varlen_states:
        refused.append(
            "return_varlen_states is True, but with cu_seqlens the final states are one a sequence: "
            "ask for return_final_states"
        )
    if refused:
        raise ValueError(f"mamba_chunk_scan_combined: {'; '.join(refused)}")
    bounds = None if cu_seqlens is None else cu_seqlens.int()
    y, final = mamba2_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, bounds, kernel=kernel)
    return (y, final) if return_final_states else y


def gated_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None = None, *, group_size: int, eps: float
) -> torch.Tensor:
    """RMSNorm of x ⊙ silu(z), or of x, over each group_size channels, in fp32: mamba-ssm's with norm_before_gate False.

    x, z [..., D] of any strides and one dtype; weight [D], D a multiple of group_size. Returns [..., D], contiguous, in
    x's dtype. Keeps its inputs alone for the backward, which computes the rest again.
    """
    return _GatedRMSNorm.apply(x, weight, z, group_size, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, z, group_size, eps):
        ctx.save_for_backward(x, weight, z)
        ctx.sizes = group_size, eps
        normed, _ = _normed(x, z, group_size, eps)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return torch.mul(normed.flatten(-2), weight, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, z = ctx.saved_tensors
        group_size, eps = ctx.sizes
        normed, scale = _normed(x, z, group_size, eps)
        dnormed = (dout * _wide(weight)).unflatten(-1, (-1, group_size))
        dgated = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)).mul_(scale).flatten(-2)
        dweight = (dout * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
        if z is None:
            return dgated.to(x.dtype), dweight, None, None, None
        gate = _wide(z)
        dz = torch.ops.aten.silu_backward(dgated * x, gate).to(z.dtype)
        return dgated.mul_(F.silu(gate)).to(x.dtype), dweight, dz, None, None


def _normed(x: torch.Tensor, z: torch.Tensor | None, group_size: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x ⊙ silu(z), or x, over its groups' root mean squares, [..., groups, group_size] in fp32 or more; 1 / those."""
    gated = _wide(x) if z is None else F.silu(_wide(z)).mul_(x)
    gated = gated.unflatten(-1, (-1, group_size))
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return gated * scale, scale


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
