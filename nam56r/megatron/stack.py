"""The layer stack: Megatron's HybridStack with an R layer, without Transformer Engine, on the plan's kernels.

Where sparse layers share indices, it has a loop of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from nam56r.megatron import stage_tensor
from nam56r.megatron.config import Config
from nam56r.megatron.norm import RMSNorm
from nam56r.megatron.sparse_attention import SparseLayer, index_sources


@dataclass
class StackSubmodules(HybridStackSubmodules):
    """Megatron's, and the recurrent layer of symbol R."""

    m2rnn_layer: ModuleSpec | type = IdentityOp


# symbol -> field of StackSubmodules
LAYERS = {
    "+": "mla_layer",
    "D": "dsa_layer",
    "E": "moe_layer",
    "M": "mamba_layer",
    "R": "m2rnn_layer",
    "-": "mlp_layer",
}
_TRANSFORMER = "+DE-"  # these take add_layer_offset, the others don't


def assign_kernels(module: torch.nn.Module, kernels: Mapping[str, str]) -> None:
    """Every module of ours under `module` runs these kernels (operator -> name)."""
    for part in module.modules():
        if hasattr(part, "kernels"):
            part.kernels = kernels


class Stack(HybridStack):
    """One pipeline segment of layers. With `config.plan`, each layer runs its slot's kernels.

    Megatron's own constructor knows no R and ends in a norm of Transformer Engine, so it is run without layers and
    without that norm; both are added here. Megatron's own forward gives layers nothing but the hidden states, so where
    the recipe's sparse layers share indices, `_forward_sharing` takes its place; it serves neither inference, fp8 and fp4
    nor Megatron's graphs of single layers.
    """

    def __init__(
        self,
        config: Config,
        submodules: StackSubmodules,
        layer_type_list: list[str],
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        mtp_depth: int = 0,
        **rest: Any,
    ):
        super().__init__(
            config,
            submodules,
            layer_type_list=[],
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=False,
            post_process=post_process,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
            **{key: value for key, value in rest.items() if key in ("pre_process", "device", "dtype")},
        )
        plan = getattr(config, "plan", None)
        sources = {} if is_mtp_layer else index_sources(config)
        self.shares_indices = any(layer != source for layer, source in sources.items())
        # those of an earlier stage, which this one uses or a later one
        self.takes_indices = any(source <= pp_layer_offset < layer for layer, source in sources.items())
        if self.shares_indices and (faults := [*_unserved(config, self.takes_indices)]):
            raise ValueError(f"sparse layers share indices, so {'; '.join(faults)}")
        self.layer_type_list = layer_type_list
        for i, symbol in enumerate(layer_type_list):
            if symbol not in LAYERS:
                raise ValueError(
                    f"layer {pp_layer_offset + i + 1} is {symbol!r}, but must be one of {' '.join(LAYERS)}"
                )
            number = pp_layer_offset + i + 1
            arguments: dict[str, Any] = dict(config=config, layer_number=number, pg_collection=pg_collection)
            if symbol in _TRANSFORMER:
                arguments["add_layer_offset"] = False
            if symbol not in "-E":
                arguments["pp_layer_offset"] = pp_layer_offset
            if symbol in "+D":
                arguments["is_mtp_layer"] = is_mtp_layer
            layer = build_module(getattr(submodules, LAYERS[symbol]), **arguments)
            if plan is not None:
                assign_kernels(layer, plan.mtp[mtp_depth].kernels if is_mtp_layer else plan.slots[number - 1].kernels)
            self.layers.append(layer)
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            if plan is not None:
                assign_kernels(self.final_norm, plan.head.kernels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *,
        inference_params: Any = None,
        **rest: Any,
    ) -> torch.Tensor:
        if self.shares_indices:
            if inference_context is not None or inference_params is not None:
                raise NotImplementedError("sparse layers that share indices train; they have no inference path")
            return self._forward_sharing(hidden_states, attention_mask=attention_mask, **rest)
        return super().forward(
            hidden_states,
            attention_mask,
            inference_context,
            rotary_pos_emb,
            inference_params=inference_params,
            **rest,
        )

    def _forward_sharing(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """Megatron's forward, and indices of sparse attention from layer to layer: through checkpoints, and from stage
        to stage."""
        indices, columns = None, self.config.index_columns
        if not self.pre_process:
            hidden_states, self.input_tensor = self.input_tensor, None
            if self.takes_indices:
                indices = stage_tensor.indices_in(hidden_states, self.config, self.tp_group)
            if columns:
                hidden_states = hidden_states[..., : self.config.hidden_size]
        for layers, again in self._parts():
            run = partial(_run, layers, options)
            if again:
                distributed = self.config.distribute_saved_activations
                hidden_states, indices = checkpoint(run, distributed, hidden_states, indices)
            else:
                hidden_states, indices = run(hidden_states, indices)
        if columns and not self.post_process:
            hidden_states = stage_tensor.join(hidden_states, indices, self.config, self.tp_group)
        if self.post_process and self.post_layer_norm:
            hidden_states = self.final_norm(hidden_states)
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)

    def _parts(self) -> Iterator[tuple[Sequence[torch.nn.Module], bool]]:
        """Layers that run together, and whether the backward runs them again: as Megatron's full recompute has them."""
        layers, method, number = list(self.layers), self.config.recompute_method, self.config.recompute_num_layers
        if not (self.training and self.config.recompute_granularity == "full"):
            yield layers, False
        elif method == "uniform":
            yield from ((layers[i : i + number], True) for i in range(0, len(layers), number))
        elif method == "block":
            yield from (([layer], i < number) for i, layer in enumerate(layers))
        else:
            raise ValueError(f"recompute_method is {method!r}, but must be 'uniform' or 'block'")


def _unserved(config: Config, takes_indices: bool) -> Iterator[str]:
    """What `_forward_sharing` doesn't do."""
    if takes_indices and not config.index_columns:
        yield "index_columns is 0, but must be what indices of another stage take: give the configuration its layout"
    for name in ("fp8", "fp4"):
        if getattr(config, name):
            yield f"{name} is {getattr(config, name)}, but must be None"
    if config.cuda_graph_impl in ("local", "transformer_engine"):
        yield f"cuda_graph_impl is {config.cuda_graph_impl}, but must be full_iteration or none: one layer's graph drops them"


def _run(
    layers: Sequence[torch.nn.Module],
    options: Mapping[str, Any],
    hidden_states: torch.Tensor,
    indices: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden_states [S/tp, B, D] and indices [B, S, top_k] or None, through layers."""
    for layer in layers:
        if isinstance(layer, SparseLayer):
            hidden_states, indices = layer(hidden_states=hidden_states, context=indices, **options)
        elif isinstance(layer, TransformerLayer):
            hidden_states, _ = layer(hidden_states=hidden_states, **options)
        else:
            hidden_states = layer(
                hidden_states=hidden_states, **{k: v for k, v in options.items() if k != "padding_mask"}
            )
    return hidden_states, indices


class MTPLayer(MultiTokenPredictionLayer):
    """Megatron's prediction depth around our Stack, which Megatron's constructor would not take for a pattern."""

    def __init__(
        self,
        config: Config,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int = 1,
        mtp_layer_pattern: str = "",
        hybrid_submodules: StackSubmodules | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **rest: Any,
    ):
        depth = layer_number - 1
        inner = ModuleSpec(
            module=Stack,
            submodules=hybrid_submodules,
            params=dict(layer_type_list=list(mtp_layer_pattern), post_layer_norm=False, mtp_depth=depth),
        )
        super().__init__(
            config,
            replace(submodules, mtp_model_layer=inner),
            layer_number=layer_number,
            pg_collection=pg_collection,
            **rest,
        )
        self.mtp_layer_pattern = mtp_layer_pattern  # Megatron's forward asks it which arguments the inner layers take
        plan = getattr(config, "plan", None)
        if plan is not None:
            for norm in (self.enorm, self.hnorm, self.final_layernorm):
                assign_kernels(norm, plan.mtp[depth].kernels)
