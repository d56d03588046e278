"""The tensor between pipeline stages, where a stage uses indices of sparse attention from one before it.

Megatron's schedules send one tensor of activations, [S/tp, B, hidden_size]. It gets `config.index_columns` further
columns: the bits of the indices, read as the activations' dtype. Nothing computes with them; their gradient is zero.
"""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from nam56r.recipe import Recipe


def columns(recipe: Recipe, layout: str, stages: int, dtype: torch.dtype) -> int:
    """How many columns of `dtype` indices take, 0 where no stage needs them from another.

    layout: Megatron's pattern, with | between segments; without any, it is split evenly over `stages`.
    """
    sizes = [len(segment) for segment in layout.partition("/")[0].split("|")]
    if len(sizes) == 1:
        sizes = [recipe.depth // stages] * stages
    numbers = iter(range(1, recipe.depth + 1))
    segments = [list(islice(numbers, size)) for size in sizes]
    carried = stages > 1 and recipe.carries_indices(segments)
    return recipe.dsa.top_k * torch.int32.itemsize // dtype.itemsize if carried else 0


def widened(config: Any) -> Any:
    """The configuration with the tensor's whole width as hidden_size: the same object where no indices are sent."""
    further = getattr(config, "index_columns", 0)
    if not further:
        return config
    config = copy.copy(config)
    config.hidden_size += further
    return config


def indices_in(x: torch.Tensor, config: Any, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """x [S/tp, B, D + columns], as received -> indices [B, S, top_k] int32 of all tokens."""
    indices = x.detach()[..., config.hidden_size :].contiguous().view(torch.int32)
    if config.sequence_parallel:
        indices = gather_from_sequence_parallel_region(indices, group=group)
    return indices.transpose(0, 1).contiguous()


def join(
    hidden: torch.Tensor, indices: torch.Tensor | None, config: Any, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """hidden [S/tp, B, D], indices [B, S, top_k] of all tokens, or None -> what is sent, [S/tp, B, D + columns].

    Each rank sends its own tokens' rows; zeros where there are no indices, which nobody uses.
    """
    rows = hidden.shape[0]
    if indices is None:
        bits = hidden.new_zeros(*hidden.shape[:2], config.index_columns)
    else:
        first = rows * group.rank() if config.sequence_parallel else 0
        bits = indices[:, first : first + rows].transpose(0, 1).contiguous().view(hidden.dtype)
    return torch.cat((hidden, bits), dim=-1)
