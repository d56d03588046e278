"""What the tests of the M and R layers share: configurations, and stand-ins that show what is copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch.utils._python_dispatch import TorchDispatchMode

from nam56r.kernels.registry import FAMILY, Device, candidates
from nam56r.megatron.config import Config, transformer_config
from nam56r.plan import make_plan
from nam56r.recipe import Recipe


def config_of(recipe: Recipe, dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides: Any) -> Config:
    """The configuration of a recipe, whose plan has references where there is nothing faster."""
    slow = [operator for operator in FAMILY if {kernel.role for kernel in candidates(operator)} == {"development"}]
    plan = make_plan(recipe, Device.of(device), dtype=dtype, kernels=dict.fromkeys(slow, "reference"))
    return transformer_config(recipe, plan, device=torch.device(device), dtype=dtype, **overrides)


def forget_losses() -> None:
    """Megatron's trackers of losses by layer are as long as the first model was deep: the next one may be deeper."""
    destroy_moe_metrics_tracker()
    DSAIndexerLossLoggingHelper.tracker.clear()
    MTPLossLoggingHelper.tracker.clear()


def drawn(module: torch.nn.Module, seed: int = 3, scale: float = 0.3) -> torch.nn.Module:
    """The module with every parameter moved at random, so that none is where a wrong formula would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return module


class Passes(TorchDispatchMode):
    """What reads or writes at least `size` elements outside of the operators, views apart."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.ops = size, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tensors = [t for t in (*_flat(result), *_flat(arguments)) if isinstance(t, torch.Tensor)]
        name = function.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and "empty" not in name and max((t.numel() for t in tensors), default=0) >= self.size:
            self.ops.append(name)
        return result


def _flat(values: Any) -> list[Any]:
    """The members of a tuple or list, of the lists in it too (what `cat` is given)."""
    return [v for value in values for v in _flat(value)] if isinstance(values, (tuple, list)) else [values]


class Stub(torch.autograd.Function):
    """Stands for an operator: the shapes of its results and gradients, and no pass. record gets what it was given."""

    @staticmethod
    def forward(ctx, record: list, shape: Iterable[int], *tensors: torch.Tensor) -> torch.Tensor:
        record.append(tensors)
        ctx.record, ctx.tensors = record, tensors
        return tensors[0].new_empty(shape)

    @staticmethod
    def backward(ctx, d):
        ctx.record.append((d,))
        return None, None, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in ctx.tensors)


class PlainCore(torch.nn.Module):
    """softmax(q kᵀ) v for Megatron's MLASelfAttention, written out."""

    def __init__(self, softmax_scale, **_):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_):
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out = torch.einsum("bhst,tbhd->sbhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
        return out.flatten(2)
