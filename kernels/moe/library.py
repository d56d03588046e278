"""Routed experts on `torch._grouped_mm`: slots sorted by expert, one product for all experts, offsets on the device.

Forward   rows = x[token of each slot, sorted by expert]     N = T·K rows of D
          h = rows · w_upᵀ;  a = gate · act(h);  y = a · w_downᵀ     grouped by expert
          out_t = the sum of its K rows of y
The gate goes on a (F wide) and not on y (D wide): y is then only summed, and the gate's gradient needs no y. Backward
keeps h and the sort, and gathers x again.

Work      2·N·D·F FLOPs a product: 2 products forward, 4 backward (twice w_up's for swiglu), the least there is.
          Unused slots cost no product; their rows are still gathered.
Memory    kept: h (N x F or 2F); at a time: about one N x D and three N x F, in x's dtype.
Traffic   beside the products: two gathers of N x D (rows, and the sum) forward, three backward.
"""

from __future__ import annotations

import torch

from nam56r.kernels.moe.pointwise import activate, activate_backward, combine

_CONTIGUOUS = torch.contiguous_format


def moe_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    activation: str = "relu2",
) -> torch.Tensor:
    """See `nam56r.kernels.moe.moe_experts`."""
    return _forward(x, expert_ids, gates, w_up, w_down, activation)[0]


def _sort(expert_ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """order [N] int64, inverse [T, K] int32 (−1 where not used), offsets [E] int32: where each expert's rows end."""
    key = expert_ids.flatten()
    key = torch.where(key == -1, experts, torch.where((key < 0) | (key >= experts), 0, key))
    key, order = key.sort(stable=True)
    each = torch.arange(experts, dtype=key.dtype, device=key.device)
    offsets = torch.searchsorted(key, each, right=True, out_int32=True)
    row = torch.arange(len(order), dtype=torch.int32, device=key.device).masked_fill_(key == experts, -1)
    return order, torch.empty_like(row).scatter_(0, order, row).view_as(expert_ids), offsets


def _gates(gates: torch.Tensor, expert_ids: torch.Tensor, experts: int) -> torch.Tensor:
    """The gates, NaN where the expert does not exist (`_sort` gives that slot to expert 0)."""
    return gates.masked_fill((expert_ids < -1) | (expert_ids >= experts), torch.nan).contiguous()


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """Grouped products want rows without gaps and a start on 16 bytes; a slice of a larger buffer may have neither."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


@torch.library.custom_op("nam56r::moe_experts", mutates_args=())
def _forward(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    experts, slots = len(w_up), expert_ids.shape[1]
    order, inverse, offsets = _sort(expert_ids, experts)
    if not len(order):
        return torch.zeros_like(x, memory_format=_CONTIGUOUS), x.new_empty(0, w_up.shape[1]), order, inverse, offsets
    h = torch._grouped_mm(x.index_select(0, order // slots), _aligned(w_up).transpose(1, 2), offs=offsets)
    a = activate(h, _gates(gates, expert_ids, experts), order, offsets, activation)
    y = torch._grouped_mm(a, _aligned(w_down).transpose(1, 2), offs=offsets)
    return combine(y, inverse), h, order, inverse, offsets


@_forward.register_fake
def _(x, expert_ids, gates, w_up, w_down, activation):
    rows = expert_ids.numel()
    return (
        torch.empty_like(x, memory_format=_CONTIGUOUS),
        x.new_empty(rows, w_up.shape[1]),
        expert_ids.new_empty(rows, dtype=torch.int64),
        torch.empty_like(expert_ids, memory_format=_CONTIGUOUS),
        expert_ids.new_empty(w_up.shape[0]),
    )


@torch.library.custom_op("nam56r::moe_experts_backward", mutates_args=())
def _backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    h: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not len(order):
        return tuple(torch.zeros_like(t, memory_format=_CONTIGUOUS) for t in (x, gates, w_up, w_down))
    token = order // expert_ids.shape[1]
    d_rows = d_out.index_select(0, token)
    d_a = torch._grouped_mm(d_rows, _aligned(w_down), offs=offsets)
    gates = _gates(gates, expert_ids, len(w_up))
    a, d_h, d_gates = activate_backward(h, gates, order, offsets, d_a, activation)
    d_w_down = torch._grouped_mm(d_rows.T, a, offs=offsets)
    del d_rows, d_a, a  # each N rows: gone before the next are made
    d_w_up = torch._grouped_mm(d_h.T, x.index_select(0, token), offs=offsets)
    d_x = combine(torch._grouped_mm(d_h, _aligned(w_up), offs=offsets), inverse)
    return d_x, d_gates, d_w_up, d_w_down


@_backward.register_fake
def _(d_out, x, expert_ids, gates, w_up, w_down, h, order, inverse, offsets, activation):
    return tuple(torch.empty_like(t, memory_format=_CONTIGUOUS) for t in (x, gates, w_up, w_down))


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, d_out, *_):
    d_x, d_gates, d_w_up, d_w_down = _backward(d_out, *ctx.saved_tensors, ctx.activation)
    return d_x, None, d_gates, d_w_up, d_w_down, None


_forward.register_autograd(_differentiate, setup_context=_save)
