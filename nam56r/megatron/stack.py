"""The layer stack: Megatron's HybridStack with an R layer, without Transformer Engine, on the plan's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from nam56r.megatron.config import Config
from nam56r.megatron.norm import RMSNorm


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
    without that norm; both are added here.
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
