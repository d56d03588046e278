"""The R slots: the M²RNN mixer (arXiv 2603.14360) in Megatron's MambaLayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule

from nam56r.kernels.conv1d import causal_conv1d
from nam56r.kernels.m2rnn import m2rnn
from nam56r.kernels.m2rnn.gate import skip_and_gate
from nam56r.kernels.norm import rms_norm
from nam56r.megatron.attention import cu_seqlens_of
from nam56r.megatron.config import Config, recipe_of
from nam56r.megatron.linear import KeepsFloat32, ReplicatedLinear, SectionedLinear
from nam56r.megatron.mamba import dt_bias


class M2RNNMixer(KeepsFloat32, MegatronModule):
    """hidden [S, B, D] -> ([S, B, D], None).

    Projection to q, k [K], v [N, V], f [N], g [N, V]; causal convolution and SiLU on q, k, v; the scan with forget gate
    exp(−exp(A_log)·softplus(f + dt_bias)); + D ⊙ v; × SiLU(g); RMSNorm over N·V; output projection. Tensor-parallel
    ranks each run the whole layer: 51 heads divide by none.

    The operators read slices in place. The projection's output stays [S, B, ·] as it is split; the convolution and the
    scan see it as [B, S, ·] with row strides; what the convolution writes is split into q, k, v; and the gate writes
    [S, B, N·V] for the norm and the output projection. Nothing is copied in between.
    """

    kernels: Mapping[str, str] = {}
    FLOAT32 = ("A_log", "dt_bias", "D", "weight")

    def __init__(
        self, config: Config, d_model: int, layer_number: int, pg_collection: ProcessGroupCollection, **_: Any
    ):
        super().__init__(config=config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        recipe = recipe_of(config).m2rnn
        self.heads, self.headdim = recipe.num_heads, recipe.v_head_dim
        inner, k = self.heads * self.headdim, recipe.k_head_dim
        self.qkv = [k, k, inner]
        sections = [sum(self.qkv), self.heads, inner]  # q k v, f, g
        self.in_proj = SectionedLinear(d_model, sections, config=config, init_method=config.init_method)
        self.out_proj = ReplicatedLinear(inner, d_model, config=config, init_method=config.output_layer_init_method)
        bound = recipe.conv_width**-0.5
        conv = torch.empty(sum(self.qkv), recipe.conv_width, dtype=config.params_dtype).uniform_(-bound, bound)
        self.conv_weight = torch.nn.Parameter(conv)
        self.norm_weight = torch.nn.Parameter(torch.ones(inner, dtype=config.params_dtype))
        self.A_log = torch.nn.Parameter(torch.empty(self.heads).uniform_(1e-6, 16).log())
        self.dt_bias = torch.nn.Parameter(dt_bias(self.heads))
        self.D = torch.nn.Parameter(torch.ones(self.heads))
        self.weight = torch.nn.Parameter(torch.eye(self.headdim).repeat(self.heads, 1, 1))
        for parameter in (self.A_log, self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, None]:
        if inference_context is not None:
            raise NotImplementedError("M2RNNMixer trains; it has no inference path")
        if self.config.sequence_parallel:
            # every rank computes the same from here on, so gradients aren't summed on the way back
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        cu_seqlens = cu_seqlens_of(packed_seq_params)
        qkv, f, g = self.in_proj(hidden_states)
        qkv, _ = causal_conv1d(
            qkv.transpose(0, 1),
            self.conv_weight,
            activation="silu",
            cu_seqlens=cu_seqlens,
            kernel=self.kernels.get("causal_conv1d"),
        )
        q, k, v = qkv.split(self.qkv, dim=-1)
        v = v.unflatten(-1, (self.heads, self.headdim))
        forget = torch.exp(-self.A_log.exp() * F.softplus(f.transpose(0, 1) + self.dt_bias))  # fp32, as dt_bias is
        y, _ = m2rnn(
            q.unsqueeze(2),
            k.unsqueeze(2),
            v,
            self.weight,
            forget,
            cu_seqlens=cu_seqlens,
            kernel=self.kernels.get("m2rnn"),
        )
        y = skip_and_gate(y.transpose(0, 1), v.transpose(0, 1), self.D, g)
        y = rms_norm(y, self.norm_weight, self.config.layernorm_epsilon, kernel=self.kernels.get("rms_norm"))
        out, _ = self.out_proj(y)
        if self.config.sequence_parallel:
            out = scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return out, None
