"""The language-model head whose loss never stores the logits whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import ColumnParallelLinear

from nam56r.kernels.cross_entropy import linear_cross_entropy


class Head(ColumnParallelLinear):
    """The output layer. While `deferred` is set it hands the hidden states on, for the loss to multiply in pieces."""

    kernels: Mapping[str, str] = {}
    deferred = False

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, Any]:
        if not self.deferred:
            return super().forward(hidden, weight=weight, runtime_gather_output=runtime_gather_output)
        if weight is not None:
            raise NotImplementedError("a shared or detached output weight has no fused loss here")
        return hidden, None


class Model(HybridModel):
    """Megatron's HybridModel; given labels, its losses (main and every MTP depth) go through `linear_cross_entropy`.

    With tensor parallelism the vocabulary is split, and Megatron's own vocabulary-parallel loss runs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if hasattr(self, "output_layer"):
            self.output_layer.deferred = labels is not None and self.config.tensor_model_parallel_size == 1
        return super().forward(*args, labels=labels, **kwargs)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [B, S]; logits [S, B, V], or the hidden states [S, B, D] of a deferred head -> loss [B, S], fp32."""
        if not self.output_layer.deferred:
            return super().compute_language_model_loss(labels, logits)
        loss = linear_cross_entropy(
            logits.flatten(0, 1),
            self.output_layer.weight,
            labels.T.flatten(),
            kernel=self.output_layer.kernels.get("linear_cross_entropy"),
        )
        return loss.view(logits.shape[:2]).T.contiguous()


def adopt(model: HybridModel) -> Model:
    """Make a model that Megatron built, and its output layer, ours; its plan's kernels are the head's."""
    model.__class__ = Model
    plan = getattr(model.config, "plan", None)
    if hasattr(model, "output_layer"):
        model.output_layer.__class__ = Head
        if plan is not None:
            model.output_layer.kernels = plan.head.kernels
    return model
