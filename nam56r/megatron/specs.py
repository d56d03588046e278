"""Ready module specs: `--spec nam56r.megatron.specs nam56r_stack_spec`, or one layer's spec into a stack of your own."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import (
    AbsorbedMLASelfAttentionSubmodules,
)
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttentionSubmodules,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from nam56r.megatron.attention import DenseAttention
from nam56r.megatron.config import Config, recipe_of
from nam56r.megatron.linear import ReplicatedLinear
from nam56r.megatron.m2rnn import M2RNNMixer
from nam56r.megatron.mamba import Mamba3Mixer
from nam56r.megatron.mamba2 import Mamba2Mixer
from nam56r.megatron.moe import Experts, MoE
from nam56r.megatron.norm import IndexerNorm, RMSNorm
from nam56r.megatron.sparse_attention import SparseAttention, SparseCore, SparseLayer
from nam56r.megatron.stack import MTPLayer, Stack, StackSubmodules

_latent_projections: dict[str, Any] = dict(
    linear_q_proj=ColumnParallelLinear,
    linear_q_down_proj=ColumnParallelLinear,
    linear_q_up_proj=ColumnParallelLinear,
    linear_kv_down_proj=ColumnParallelLinear,
    linear_kv_up_proj=ColumnParallelLinear,
    linear_proj=RowParallelLinear,
    q_layernorm=RMSNorm,
    kv_layernorm=RMSNorm,
)
_mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _attention_layer(attention: ModuleSpec, layer: type[TransformerLayer] = TransformerLayer) -> ModuleSpec:
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _mixer_layer(mixer: type | ModuleSpec, **more: Any) -> ModuleSpec:
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=RMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add, **more),
    )


mla_layer = _attention_layer(
    ModuleSpec(
        module=DenseAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(core_attention=IdentityOp, **_latent_projections),
    )
)

dsa_layer = _attention_layer(
    ModuleSpec(
        module=SparseAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=AbsorbedMLASelfAttentionSubmodules(
            core_attention=ModuleSpec(
                module=SparseCore,
                submodules=DSAttentionSubmodules(
                    indexer=ModuleSpec(
                        module=DSAIndexer,
                        submodules=DSAIndexerSubmodules(
                            linear_wq_b=ReplicatedLinear,
                            linear_wk=ReplicatedLinear,
                            k_norm=IndexerNorm,
                            linear_weights_proj=ReplicatedLinear,
                        ),
                    )
                ),
            ),
            **_latent_projections,
        ),
    ),
    SparseLayer,
)

moe_layer = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=partial(
            MoE, submodules=MoESubmodules(experts=Experts, shared_experts=partial(SharedExpertMLP, submodules=_mlp))
        ),
        mlp_bda=get_bias_dropout_add,
    ),
)

mlp_layer = ModuleSpec(
    module=MLPLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=partial(MLP.as_mlp_submodule, submodules=_mlp),
        mlp_bda=get_bias_dropout_add,
    ),
)

mamba3_layer = _mixer_layer(Mamba3Mixer)
mamba2_layer = _mixer_layer(
    ModuleSpec(
        module=Mamba2Mixer,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    ),
    # Megatron's own stack has this norm in the projection: checkpoints move both ways
    sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
)
m2rnn_layer = _mixer_layer(M2RNNMixer)


class MambaSlot(MambaLayer):
    """An M layer, whose kind is the recipe's: one symbol stands for both. submodules are by kind."""

    def __init__(self, config: Config, submodules: dict[str, MambaLayerSubmodules], **rest: Any):
        super().__init__(config, submodules[recipe_of(config).mamba.kind], **rest)


mamba_layer = ModuleSpec(
    module=MambaSlot, submodules={"mamba3": mamba3_layer.submodules, "mamba2": mamba2_layer.submodules}
)

mtp_block_spec = ModuleSpec(
    module=MultiTokenPredictionBlock,
    submodules=MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=MTPLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=RMSNorm, hnorm=RMSNorm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=RMSNorm
                ),
            )
        ]
    ),
)

nam56r_stack_spec = ModuleSpec(
    module=Stack,
    submodules=StackSubmodules(
        mamba_layer=mamba_layer,
        dsa_layer=dsa_layer,
        mla_layer=mla_layer,
        mlp_layer=mlp_layer,
        moe_layer=moe_layer,
        m2rnn_layer=m2rnn_layer,
        mtp_block_spec=mtp_block_spec,
    ),
)
