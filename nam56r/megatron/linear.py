"""Linear layers that every tensor-parallel rank holds whole, and parameters that stay fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

SECTION_COLUMNS = 8  # a section of a product starts at a multiple of it: 16 bytes of bf16, one vector load
PRODUCT_COLUMNS = 64  # a product's width is a multiple of it: whole 128-byte lines of bf16


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


class SectionedLinear(ReplicatedLinear):
    """y = x Wᵀ without bias, given in sections: x [..., D] -> a tuple of [..., section], slices of one product.

    cuBLAS and vector loads want aligned rows, so the product has columns of zeros after each section, up to the next
    multiple of SECTION_COLUMNS, and after the last one up to PRODUCT_COLUMNS. The parameter, its gradient, its
    optimizer state and its checkpoints have none of them: its rows are the sections', one after another.
    """

    def __init__(
        self,
        input_size: int,
        sections: Sequence[int],
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
    ):
        super().__init__(input_size, sum(sections), config=config, init_method=init_method)
        self.parts: list[int] = []  # a section, the zeros after it, the next section, …
        for section in sections:
            self.parts += [section, -section % SECTION_COLUMNS]
        self.parts[-1] += -sum(self.parts) % PRODUCT_COLUMNS

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        # one split: its backward is one concatenation, where slices would each fill a whole gradient and be added up
        return _PaddedProduct.apply(x, self.weight, self.parts).split(self.parts, dim=-1)[::2]


class _PaddedProduct(torch.autograd.Function):
    """x [..., D], weight [rows, D] -> [..., sum(parts)]. Keeps the weight itself: backward pads it again."""

    @staticmethod
    def forward(ctx, x, weight, parts):
        ctx.save_for_backward(x, weight)
        ctx.parts = parts
        return F.linear(x, _padded(weight, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dy @ _padded(weight, ctx.parts), torch.cat(dweight.split(ctx.parts)[::2]), None


def _padded(weight: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """The weight's sections with rows of zeros after each, in one copy."""
    sections = zip(weight.split(parts[::2]), parts[1::2])
    return torch.cat(
        [rows for section, zeros in sections for rows in (section, weight.new_zeros(zeros, weight.shape[1]))]
    )


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
