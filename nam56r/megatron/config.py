"""A recipe and its plan as Megatron's transformer configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from nam56r.megatron.stage_tensor import columns
from nam56r.plan import Plan
from nam56r.recipe import Recipe
from nam56r.translate.contract import index_sharing


@dataclass
class Config(MLATransformerConfig):
    """Megatron's MLA configuration with the recipe, the plan that chose the kernels, and by how many columns the tensor
    between pipeline stages is wider (`stage_tensor`)."""

    recipe: Recipe | None = None
    plan: Plan | None = None
    index_columns: int = 0


def recipe_of(config: MLATransformerConfig) -> Recipe:
    """The recipe that a configuration carries. Raises ValueError for Megatron's own, which has no sizes for M and R."""
    recipe = getattr(config, "recipe", None)
    if recipe is None:
        raise ValueError(
            f"{type(config).__name__} carries no recipe: M and R layers take their sizes from one; "
            "build the configuration with nam56r.megatron.config.transformer_config"
        )
    return recipe


def model_values(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says in the fields of Megatron's configuration; nothing of families that it hasn't got."""
    mla, dsa, moe, symbols = recipe.mla, recipe.dsa, recipe.moe, recipe.layers.counts
    values: dict[str, Any] = dict(
        num_layers=recipe.depth,
        hidden_size=recipe.hidden_size,
        ffn_hidden_size=recipe.ffn_hidden_size,
        num_attention_heads=mla.num_heads,
        is_hybrid_model=True,  # output projections start at std / √depth
        normalization="RMSNorm",
        layernorm_epsilon=recipe.norm_eps,
        init_method_std=recipe.init_std,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # the dense and the shared MLP are SwiGLU; the routed experts' relu² is in moe.Experts
        gated_linear_unit=True,
        activation_func=F.silu,
        mtp_num_layers=recipe.mtp.num_depths or None,
    )
    if symbols["A"] or recipe.mtp.num_depths:
        values |= dict(
            q_lora_rank=mla.q_lora_rank,
            kv_lora_rank=mla.kv_lora_rank,
            qk_head_dim=mla.qk_nope_head_dim,
            qk_pos_emb_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim,
            qk_layernorm=True,
            rope_type="rope",
            rotary_base=mla.rope_theta,
        )
    if dsa.ranks:
        values |= dict(
            dsa_indexer_n_heads=dsa.index_num_heads,
            dsa_indexer_head_dim=dsa.index_head_dim,
            dsa_indexer_topk=dsa.top_k,
            dsa_indexer_loss_coeff=dsa.loss_coeff,
            dsa_indexer_use_sparse_loss=True,
            dsa_indexer_rotate_activation=False,
        )
    if recipe.shares_indices and (sharing := index_sharing(recipe)):
        values |= dict(zip(("dsa_indexer_skip_topk_offset", "dsa_indexer_topk_freq"), sharing, strict=True))
    if symbols["E"]:
        values |= dict(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_ffn_hidden_size=moe.ffn_hidden_size,
            moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=moe.aux_loss_coeff,
            moe_router_dtype="fp32",
        )
    if symbols["M"]:
        values |= dict(
            mamba_state_dim=recipe.mamba.d_state,
            mamba_head_dim=recipe.mamba.headdim,
            mamba_num_groups=recipe.mamba.ngroups,
            mamba_num_heads=recipe.mamba_heads,
        )
    if recipe.mtp.num_depths:
        values["mtp_loss_scaling_factor"] = recipe.mtp.loss_coeff
    return values


# What our layers need of Megatron's configuration, whatever the recipe. The variant stays unset: our dense and sparse
# layers are told apart by their symbols, and it would change what Megatron does around the dense ones.
OUR_VALUES: dict[str, Any] = dict(
    bias_activation_fusion=False,
    experimental_attention_variant=None,
    experimental_attention_variant_loss_scale_func=DSAIndexerLossAutoScaler.set_loss_scale,
    transformer_impl="local",
)

# What the operator may choose, or Megatron itself does: parallelism (all of ModelParallelConfig), where and how fast a
# model runs, what `complete` sets, and what none of our layers reads.
FREE = {field.name for field in fields(ModelParallelConfig)} | {
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("distribute_saved_activations", "cp_comm_type", "config_logger_dir", "moe_per_layer_logging"),
    *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope"),
    *("cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph", "cuda_graph_warmup_steps"),
    *("bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm", "moe_permute_fusion", "moe_router_fusion"),
    *("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "inference_rng_tracker", "inference_sampling_seed"),
    *("attention_softmax_in_fp32", "rotary_scaling_factor"),  # of Megatron's own core, and of YaRN
    *OUR_VALUES,
} - {"transformer_impl"}  # Megatron's stock layers are another model


def transformer_config(
    recipe: Recipe,
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    pipeline_parallel: int = 1,
    layout: str = "",
    **overrides: Any,
) -> Config:
    """The configuration of a recipe on `device`. overrides go to Megatron's config as they are.

    layout: Megatron's pattern with stage boundaries; without any, stages are even.
    """
    cpu = device.type == "cpu"
    placement = dict(
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=pipeline_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=cpu,
        bias_dropout_fusion=not cpu,
        gradient_accumulation_fusion=False,
        moe_token_dispatcher_type="allgather" if cpu else "alltoall",
    )
    config = Config(recipe=recipe, plan=plan, **(model_values(recipe) | OUR_VALUES | placement | overrides))
    config.index_columns = _index_columns(config, layout)
    return config


def complete(
    config: TransformerConfig,
    recipe: Recipe,
    plan: Plan,
    *,
    layout: str = "",
    stock: bool = False,
    also: Iterable[str] = (),
) -> None:
    """Give a configuration that Megatron made from its flags what no flag can say: the recipe and the plan.

    layout: as in `transformer_config`. stock: it is for Megatron's own layers. also: what else was found to disagree.
    Raises ValueError naming that, and every field that has another value than the recipe, or, where the recipe has none
    and the operator may not choose, than Megatron's default: our layers would ignore it, or become another model.
    """
    if differing := [*also, *_disagreements(config, recipe, stock)]:
        raise ValueError(
            f"Megatron's arguments disagree with recipe {recipe.name}: {'; '.join(differing)}: "
            "take them from `nam56r translate` or `nam56r launch`"
        )
    config.recipe, config.plan = recipe, plan
    if not stock:
        for name, value in OUR_VALUES.items():
            setattr(config, name, value)
        config.index_columns = _index_columns(config, layout)


def _index_columns(config: Config, layout: str) -> int:
    dtype = config.pipeline_dtype or config.params_dtype
    return columns(recipe_of(config), layout, config.pipeline_model_parallel_size, dtype)


def _disagreements(config: TransformerConfig, recipe: Recipe, stock: bool) -> Iterator[str]:
    values = model_values(recipe)
    if "q_lora_rank" in values and not isinstance(config, MLATransformerConfig):
        yield "multi_latent_attention is False, but the recipe has attention"
        return
    wanted = type(config)(**values, transformer_impl="transformer_engine" if stock else "local")
    for field in fields(wanted):
        found, value = _plain(getattr(config, field.name)), _plain(getattr(wanted, field.name))
        if field.name not in FREE and found != value:
            yield f"{field.name} is {found}, but the recipe has {value}"


def _plain(value: Any) -> Any:
    """Initialisation functions are partials, which compare by identity."""
    return (value.func.__name__, value.keywords) if isinstance(value, partial) else value
