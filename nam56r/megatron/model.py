"""From a recipe and its plan to Megatron's model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nam56r.megatron.config import transformer_config
from nam56r.megatron.head import Model
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.specs import nam56r_stack_spec
from nam56r.plan import Plan
from nam56r.recipe import Recipe
from nam56r.translate import translate


def build_model(recipe: Recipe, plan: Plan, *, device: torch.device, dtype: torch.dtype, **config: Any) -> Model:
    """The unwrapped model on `device`, with parameters in `dtype` (and fp32 where a parameter must stay so).

    Megatron's process groups must be initialised; the parallel sizes are theirs. config goes to
    `config.transformer_config`. Stage boundaries in the recipe's pattern count with pipeline stages only: without any,
    Megatron would build the first segment and leave out the others.
    """
    apply_patches("model")
    pattern = translate(recipe).native_pattern
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        pattern = pattern.replace("|", "")
    sizes: dict[str, Any] = dict(
        tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
        expert_parallel=parallel_state.get_expert_model_parallel_world_size(),
        pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
        layout=pattern,
    )
    model = Model(
        transformer_config(recipe, plan, device=device, dtype=dtype, **(sizes | config)),
        nam56r_stack_spec,
        vocab_size=recipe.vocab_size,
        max_sequence_length=recipe.seq_length,
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model.to(device)
