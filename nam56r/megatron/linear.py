"""A linear layer that every tensor-parallel rank holds whole, and parameters that stay fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedLinear(torch.nn.Linear):
    """y = x Wᵀ without bias, in Megatron's linear form: gives (y, None). Takes the place of TE's duplicated linear."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        **_: Any,
    ):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = input_size, output_size
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.register_parameter("bias", None)
        init_method(self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class KeepsFloat32(torch.nn.Module):
    """A module whose parameters named in FLOAT32 stay fp32 through .bfloat16() and .half(), as Float16Module calls."""

    FLOAT32: tuple[str, ...] = ()

    def _apply(self, fn: Callable, recurse: bool = True) -> KeepsFloat32:
        before = {name: getattr(self, name).data for name in self.FLOAT32 if getattr(self, name, None) is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            parameter.data = data.to(parameter.device, torch.float32)
        return self
