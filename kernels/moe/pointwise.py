"""What memory bounds in routed experts, each one pass: Triton on CUDA (or interpreted), PyTorch elsewhere.

N = T·K slots are sorted by expert; row i belongs to slot order[i], and inverse[t, k] is the row of slot (t, k), −1
where it is not used. Unused slots are sorted to the end, past offsets[-1]. The grouped products neither read nor write
those rows, so what is in them may be anything, NaN too: no kernel here lets it reach a result.
Arithmetic is fp32; every result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nam56r.kernels.moe.reference import activate as _activation


@triton.jit
def activate_kernel(h, gates, order, offsets, a, E, F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    """a [N, F] = gate · act(h [N, F or 2F]), one program a row."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + E - 1):
        gate = tl.load(gates + tl.load(order + row)).to(tl.float32)
        h_row = h + row * (2 * F if SWIGLU else F)
        for start in range(0, F, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < F
            u = tl.load(h_row + column, mask=inside, other=0.0).to(tl.float32)
            if SWIGLU:
                linear = tl.load(h_row + F + column, mask=inside, other=0.0).to(tl.float32)
                act = u / (1 + tl.exp(-u)) * linear
            else:
                u = tl.where(u < 0, 0.0, u)  # keeps NaN
                act = u * u
            tl.store(a + row * F + column, (gate * act).to(a.dtype.element_ty), mask=inside)


@triton.jit
def activate_backward_kernel(
    h, gates, order, offsets, d_a, a, d_h, d_gates, E, F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr
):
    """From d_a [N, F]: a again, d_h [N, F or 2F], and d_gates of the row's slot; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + E - 1):
        slot = tl.load(order + row)
        gate = tl.load(gates + slot).to(tl.float32)
        first = row * (2 * F if SWIGLU else F)
        d_gate = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, F, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < F
            u = tl.load(h + first + column, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(d_a + row * F + column, mask=inside, other=0.0).to(tl.float32)
            if SWIGLU:
                linear = tl.load(h + first + F + column, mask=inside, other=0.0).to(tl.float32)
                sigmoid = 1 / (1 + tl.exp(-u))
                act = u * sigmoid * linear
                d_u = gate * d * linear * sigmoid * (1 + u * (1 - sigmoid))
                d_linear = gate * d * u * sigmoid
                tl.store(d_h + first + F + column, d_linear.to(d_h.dtype.element_ty), mask=inside)
            else:
                u = tl.where(u < 0, 0.0, u)
                act = u * u
                d_u = 2 * gate * d * u
            d_gate += d * act
            tl.store(d_h + first + column, d_u.to(d_h.dtype.element_ty), mask=inside)
            tl.store(a + row * F + column, (gate * act).to(a.dtype.element_ty), mask=inside)
        tl.store(d_gates + slot, tl.sum(d_gate, 0).to(d_gates.dtype.element_ty))


@triton.jit
def combine_kernel(y, inverse, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, D] = Σ_k y [inverse[t, k]], one program a token and BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for k in range(K):
        row = tl.load(inverse + token * K + k).to(tl.int64)
        total += tl.load(y + row * D + column, mask=(column < D) & (row >= 0), other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or triton.knobs.runtime.interpret


def activate(h: torch.Tensor, gates: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, activation: str):
    """a [N, F] = gate · act(h), ready for the down product."""
    rows, width = h.shape[0], h.shape[1] // (2 if activation == "swiglu" else 1)
    if not _fused(h):
        return (gates.flatten()[order, None].float() * _activation(h.float(), activation)).to(h.dtype)
    a = h.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    activate_kernel[(rows,)](h, gates, order, offsets, a, len(offsets), width, activation == "swiglu", block)
    return a


def activate_backward(
    h: torch.Tensor, gates: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, d_a: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a [N, F] again, d_h like h, and d_gates [T, K] (0 where the slot is not used)."""
    d_gates = torch.zeros_like(gates)
    if _fused(h):
        a, d_h = torch.empty_like(d_a), torch.empty_like(h)
        block = min(1024, triton.next_power_of_2(d_a.shape[1]))
        activate_backward_kernel[(len(h),)](
            h, gates, order, offsets, d_a, a, d_h, d_gates, len(offsets), d_a.shape[1], activation == "swiglu", block
        )
        return a, d_h, d_gates
    gate, u, d = gates.flatten()[order, None].float(), h.float(), d_a.float()
    act = _activation(u, activation)
    if activation == "swiglu":
        (u, linear), sigmoid = u.chunk(2, -1), u.chunk(2, -1)[0].sigmoid()
        d_h = torch.cat((linear * sigmoid * (1 + u * (1 - sigmoid)) * gate * d, u * sigmoid * gate * d), -1)
    else:
        d_h = 2 * gate * d * u.relu()
    used = torch.arange(len(h), device=h.device) < offsets[-1]
    d_gates.flatten()[order] = torch.where(used, (d * act).sum(-1), 0.0).to(gates.dtype)
    return (gate * act).to(h.dtype), d_h.to(h.dtype), d_gates


def combine(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """out [T, D] = Σ_k y [inverse[t, k]]: no atomics, the same order of the sum every time."""
    (tokens, slots), width = inverse.shape, y.shape[1]
    if not _fused(y):
        return torch.where((inverse >= 0)[..., None], y[inverse.clamp_min(0)].float(), 0.0).sum(1).to(y.dtype)
    out = y.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    combine_kernel[(tokens, triton.cdiv(width, block))](y, inverse, out, width, slots, block)
    return out
