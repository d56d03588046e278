"""RMSNorm on our kernel, and the indexer's LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nam56r.kernels.norm import rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) · weight over the last dimension, in Megatron's norm-builder form (config, hidden_size, eps).

    The weight is replicated over tensor-parallel ranks; under sequence parallelism Megatron sums its gradient.
    """

    kernels: Mapping[str, str] = {}

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, kernel=self.kernels.get("rms_norm"))


class IndexerNorm(torch.nn.LayerNorm):
    """The LayerNorm over the index key that Megatron's DSAIndexer asks for."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
