"""The sparse A slots: DeepSeek sparse attention, with the parameters, and so the state dict, of Megatron's own modules.

A layer computes indices, or uses those of an earlier one (`dsa.share_every`); then it has no indexer and no loss of one.
Indices are an argument and a result all the way, from the stack's loop down to the core: nothing keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossAutoScaler,
    DSAIndexerLossLoggingHelper,
    DSAttentionSubmodules,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from nam56r.kernels.dsa import index_top_k, indexer_kl_loss, sparse_latent_attention
from nam56r.megatron.attention import awaited, cu_seqlens_of, swap_down_projections


def index_sources(config: Any) -> dict[int, int]:
    """`Recipe.index_sources` of the configuration's recipe; without one, none: every layer computes its own."""
    recipe = getattr(config, "recipe", None)
    return {} if recipe is None else recipe.index_sources


class SparseLayer(TransformerLayer):
    """A D slot: norm, `SparseAttention` and residual, with indices as Megatron's `context`.

    hidden_states [S/tp, B, D], context: indices [B, S, top_k] int32 or None -> hidden states, and indices for the next
    sparse layer, None where that computes its own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        sources = index_sources(self.config)
        own = sources.get(self.layer_number)
        self.hands_on = any(layer > self.layer_number and source == own for layer, source in sources.items())

    def _forward_attention(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.recompute_input_layernorm:
            again = CheckpointWithoutOutput(fp8=None)  # False would count as fp8
            normed = again.checkpoint(self.input_layernorm, hidden_states)
        else:
            normed = self.input_layernorm(hidden_states)
        out, bias, indices = self.self_attention(normed, packed_seq_params=packed_seq_params, indices=context)
        if self.recompute_input_layernorm:
            again.discard_output_and_register_recompute(out)
        residual = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add((out, bias), residual, self.hidden_dropout)
        return hidden_states, indices if self.hands_on else None


class SparseAttention(AbsorbedMLASelfAttention):
    """Megatron's absorbed MLA around a `SparseCore`, whose indices it takes and returns.

    hidden_states [S/tp, B, D], indices [B, S, top_k] int32 or None -> (out [S/tp, B, D], None, indices).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        swap_down_projections(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        *,
        indices: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        if inference_context is not None:
            raise NotImplementedError("SparseAttention trains; it has no inference path")
        c = self.config
        awaited(self.linear_kv_up_proj)
        q, kv, q_latent = self.get_query_key_value_tensors(hidden_states, packed_seq_params=packed_seq_params)
        core = partial(self.core_attention, packed_seq_params=packed_seq_params)
        if self.checkpoint_core_attention and self.training:
            out, indices = checkpoint(core, False, q, kv, hidden_states, q_latent, indices)
        else:
            out, indices = core(q, kv, hidden_states, q_latent, indices)
        out = out.unflatten(-1, (-1, c.kv_lora_rank))
        out = torch.einsum("sbhl,hdl->sbhd", out, self._get_v_up_weight()).flatten(2).contiguous()
        if self.recompute_up_proj:
            self.qkv_up_checkpoint.discard_output_and_register_recompute(out)
            self.qkv_up_checkpoint = None
        return *self.linear_proj(out), indices


class SparseCore(MegatronModule):
    """The core of Megatron's AbsorbedMLASelfAttention on our kernels: index, select, attend, and the indexer's loss.

    query [S, B, H, L + Dr], key [S, B, 1, L + Dr] (latent and rope key), x [S, B, D] and qr [S, B, Lq] for the indexer,
    which learns from its own loss alone -> [S, B, H·L], and the indices used, [B, S, top_k] int32; the caller applies the
    value up-projection. A core that shares another layer's indices has no indexer, and takes them.
    """

    kernels: Mapping[str, str] = {}

    def __init__(
        self,
        config: Any,
        submodules: DSAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        # Megatron builds the core twice, and knows the scale the second time only
        self.layer_number, self.scale, self.value_dim = layer_number, softmax_scale, config.kv_lora_rank
        self.pg_collection = pg_collection
        self.source = index_sources(config).get(layer_number, layer_number)
        if self.source == layer_number:
            self.indexer = build_module(submodules.indexer, config=config, pg_collection=pg_collection)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor,
        indices: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens = cu_seqlens_of(packed_seq_params)
        if cu_seqlens is not None:  # Megatron's packed form drops the batch dimension
            query, key = query.unsqueeze(1), key.unsqueeze(1)
            qr = qr.unsqueeze(1) if qr.ndim == 2 else qr
        q, kv = query.transpose(0, 1), key.squeeze(2).transpose(0, 1)  # [B, S, H, L + Dr], [B, S, L + Dr]
        index = None
        if self.source == self.layer_number:
            parts = self.indexer.forward_before_topk(x.detach(), qr.detach(), packed_seq_params)
            index = [t.transpose(0, 1) for t in parts]
            indices = index_top_k(
                *(t.detach() for t in index),
                self.config.dsa_indexer_topk,
                cu_seqlens=cu_seqlens,
                kernel=self.kernels.get("index_top_k"),
            )
        elif indices is None:
            raise ValueError(f"layer {self.layer_number} uses the indices of layer {self.source}, but was given none")
        out, lse = sparse_latent_attention(
            q,
            kv,
            indices,
            value_dim=self.value_dim,
            scale=self.scale,
            kernel=self.kernels.get("sparse_latent_attention"),
        )
        out = out.flatten(2).transpose(0, 1).contiguous()
        coefficient = self.config.dsa_indexer_loss_coeff or 0.0
        if index is not None and coefficient and self.training and torch.is_grad_enabled():
            loss = coefficient * self._indexer_loss(index, q.detach(), kv.detach(), indices, lse)
            DSAIndexerLossLoggingHelper.save_loss_to_tracker(
                loss, self.layer_number, self.config.num_layers, avg_group=self.pg_collection.tp
            )
            out = DSAIndexerLossAutoScaler.apply(out, loss)
        return out, indices

    def _indexer_loss(
        self, index: list[torch.Tensor], q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, lse: torch.Tensor
    ) -> torch.Tensor:
        """KL to the attention of all heads, mean over queries; heads split over ranks are gathered for it."""
        if self.config.tensor_model_parallel_size > 1:
            q, lse = _gather_heads(q, self.pg_collection.tp), _gather_heads(lse, self.pg_collection.tp)
        index_q, index_k, weights = index
        kernel = self.kernels.get("indexer_kl_loss")
        kl = indexer_kl_loss(index_q, index_k, weights, q, kv, indices, lse, scale=self.scale, kernel=kernel)
        return kl.mean()


def _gather_heads(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[B, S, H/tp, …] of every rank -> [B, S, H, …]; no gradient."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=2)
