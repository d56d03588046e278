"""The A slots: dense multi-head latent attention, and DeepSeek sparse attention.

Both keep the parameters, and so the state dict, of Megatron's own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossAutoScaler,
    DSAIndexerLossLoggingHelper,
    DSAttentionSubmodules,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module

from nam56r.kernels.dsa import index_top_k, indexer_kl_loss, sparse_latent_attention
from nam56r.kernels.mla import mla_attention


def cu_seqlens_of(packed: PackedSeqParams | None) -> torch.Tensor | None:
    """The packed row's boundaries (int32 [n + 1]), or None."""
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format is {packed.qkv_format!r}, but must be 'thd'")
    padded = packed.cu_seqlens_q_padded
    return (packed.cu_seqlens_q if padded is None else padded).int()


class DownProjection(ColumnParallelLinear):
    """A column-parallel linear that hands its output on as a duplicated one would: whole rows of this rank's tokens.

    Megatron gathers the columns itself, but then each rank keeps only its own heads' gradient of the rope key.
    """

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        y, _ = super().forward(x)
        if self.config.tensor_model_parallel_size > 1:
            y = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(y))
        return y, None


def _swap_down_projections(attention: torch.nn.Module) -> None:
    """Megatron takes ColumnParallelLinear itself only, by identity, so the class changes after it is built."""
    attention.linear_q_down_proj.__class__ = DownProjection
    attention.linear_kv_down_proj.__class__ = DownProjection


class SparseAttention(AbsorbedMLASelfAttention):
    """Megatron's absorbed MLA, for a `SparseCore`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _swap_down_projections(self)


class DenseAttention(MLASelfAttention):
    """Megatron's MLASelfAttention with its core on `mla_attention`: no mask, and no call into TE or flash attention.

    hidden_states [S, B, D] (S split over tensor-parallel ranks under sequence parallelism) -> ([S, B, D], None).
    """

    kernels: Mapping[str, str] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _swap_down_projections(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inference_context is not None:
            raise NotImplementedError("DenseAttention trains; it has no inference path")
        config = self.config
        cu_seqlens = cu_seqlens_of(packed_seq_params)
        q_latent, kv_latent, k_rope = self.latents(hidden_states)

        q, _ = self.linear_q_up_proj(self.q_layernorm(q_latent))
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(kv_latent))
        heads = self.num_attention_heads_per_partition
        q = q.unflatten(-1, (heads, self.q_head_dim))
        kv = kv.unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        k_nope, v = kv.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        q_nope, q_rope = q.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)

        rotary = self.rotary_pos_emb(q.shape[0], packed_seq=cu_seqlens is not None)

        def rotate(x: torch.Tensor) -> torch.Tensor:  # [S, B, H, Dr]; Megatron's packed form has no B
            if cu_seqlens is not None:
                return self._rope(x.squeeze(1), rotary, cu_seqlens).unsqueeze(1)
            return self._rope(x, rotary, None)

        q = torch.cat([q_nope, rotate(q_rope)], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2)).squeeze(2)
        out = mla_attention(
            q.transpose(0, 1),
            k_nope.transpose(0, 1),
            k_rope.transpose(0, 1),
            v.transpose(0, 1),
            scale=self.softmax_scale,
            cu_seqlens=cu_seqlens,
            kernel=self.kernels.get("mla_attention"),
        )
        return self.linear_proj(out.flatten(2).transpose(0, 1).contiguous())

    def latents(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q latent [S/tp, B, Lq], kv latent [S/tp, B, Lkv], rope key [S, B, Dr], before norms and rotation."""
        q_latent, kv = self._qkv_down_projection(hidden_states)
        kv_latent, k_rope = kv.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        if self.config.sequence_parallel:
            k_rope = gather_from_sequence_parallel_region(k_rope, group=self.tp_group)
        return q_latent, kv_latent, k_rope

    def _rope(self, x: torch.Tensor, rotary: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return apply_rotary_pos_emb(
            x,
            rotary,
            config=self.config,
            cu_seqlens=cu_seqlens,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )


class SparseCore(MegatronModule):
    """The core of Megatron's AbsorbedMLASelfAttention on our kernels: index, select, attend, and the indexer's loss.

    query [S, B, H, L + Dr], key [S, B, 1, L + Dr] (latent and rope key), x [S, B, D] and qr [S, B, Lq] for the indexer,
    which learns from its own loss alone -> [S, B, H·L]; the caller applies the value up-projection.
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
        self.indexer = build_module(submodules.indexer, config=config, pg_collection=pg_collection)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        x: torch.Tensor,
        qr: torch.Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        cu_seqlens = cu_seqlens_of(packed_seq_params)
        if cu_seqlens is not None:  # Megatron's packed form drops the batch dimension
            query, key = query.unsqueeze(1), key.unsqueeze(1)
            qr = qr.unsqueeze(1) if qr.ndim == 2 else qr
        q, kv = query.transpose(0, 1), key.squeeze(2).transpose(0, 1)  # [B, S, H, L + Dr], [B, S, L + Dr]
        index_q, index_k, index_weights = self.indexer.forward_before_topk(x.detach(), qr.detach(), packed_seq_params)
        index = [t.transpose(0, 1) for t in (index_q, index_k, index_weights)]
        indices = index_top_k(
            *(t.detach() for t in index),
            self.config.dsa_indexer_topk,
            cu_seqlens=cu_seqlens,
            kernel=self.kernels.get("index_top_k"),
        )
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
        if coefficient and self.training and torch.is_grad_enabled():
            loss = coefficient * self._indexer_loss(index, q.detach(), kv.detach(), indices, lse)
            DSAIndexerLossLoggingHelper.save_loss_to_tracker(
                loss, self.layer_number, self.config.num_layers, avg_group=self.pg_collection.tp
            )
            out = DSAIndexerLossAutoScaler.apply(out, loss)
        return out

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
