"""The dense A slots: multi-head latent attention, with the parameters, and so the state dict, of Megatron's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.autograd.function import once_differentiable

from nam56r.kernels.mla import (
    Yarn,
    latent_attention,
    mla_attention,
    mla_latents,
    mla_queries,
    positions_of,
    rope_tables,
)
from nam56r.megatron.norm import RMSNorm
from nam56r.problems import ATTENTION, forms
from nam56r.recipe import MLA


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

    They are all tokens, without sequence parallelism. Megatron gathers the columns itself, but then each rank keeps
    only its own heads' gradient of the rope key.
    """

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        y, _ = super().forward(x)
        if self.config.tensor_model_parallel_size > 1:
            y = gather_from_tensor_model_parallel_region(y)
        if self.config.sequence_parallel:
            y = scatter_to_sequence_parallel_region(y)
        return y, None


def swap_down_projections(attention: torch.nn.Module) -> None:
    """Megatron takes ColumnParallelLinear itself only, by identity, so the class changes after it is built."""
    attention.linear_q_down_proj.__class__ = DownProjection
    attention.linear_kv_down_proj.__class__ = DownProjection


class DenseAttention(MLASelfAttention):
    """Megatron's MLASelfAttention on our operators: no mask, and no call into TE or flash attention.

    hidden_states [S, B, D] (S split over tensor-parallel ranks under sequence parallelism) -> ([S, B, D], None).
    Down-projections; norms and rotation in `mla_latents` and `mla_queries`; then, as `kernels` has one or the other,
    `latent_attention`, for which the queries absorb linear_kv_up_proj's part for the keys and whose output its part for
    the values multiplies, or `mla_attention` on expanded keys and values; the output projection. Both give the same.

    Raises ValueError, naming each, for what it doesn't do: norms that aren't RMSNorm, context parallelism, a rotation
    of a part of the rope features.
    """

    kernels: Mapping[str, str] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if faults := [*self._faults()]:
            raise ValueError(f"DenseAttention: {'; '.join(faults)}")
        swap_down_projections(self)

    def _faults(self) -> Iterator[str]:
        if self.config.q_lora_rank is None:
            yield "q_lora_rank is None, but must be a number"
            return
        norms = {"q_layernorm": self.q_layernorm, "kv_layernorm": self.kv_layernorm}
        for name, norm in norms.items():
            if type(norm) not in (RMSNorm, torch.nn.RMSNorm, IdentityOp):
                yield f"{name} is {type(norm).__name__}, but must be an RMSNorm (nam56r's or torch's) or IdentityOp"
        normed = [norm for norm in norms.values() if isinstance(norm, (RMSNorm, torch.nn.RMSNorm))]
        if any(norm.weight is None for norm in normed):
            yield "q_layernorm or kv_layernorm has no weight, but must have one"
        if None in (eps := {norm.eps for norm in normed}) or len(eps) > 1:
            yield f"q_layernorm and kv_layernorm have eps {' and '.join(map(str, eps))}, but must have one number"
        if not isinstance(self.linear_kv_up_proj, ColumnParallelLinear):
            yield f"linear_kv_up_proj is {type(self.linear_kv_up_proj).__name__}, but must be ColumnParallelLinear"
        if self.config.context_parallel_size > 1:
            yield f"context_parallel_size is {self.config.context_parallel_size}, but must be 1"
        if self.config.rotary_percent != 1:
            yield f"rotary_percent is {self.config.rotary_percent}, but must be 1"

    @property
    def absorbed(self) -> bool:
        """Which form runs: the one whose operator the plan chose; without a plan, the better one."""
        for form, operator in ATTENTION.items():
            if operator in self.kernels:
                return form == "absorbed"
        c = self.config
        sizes = dict(qk_nope_head_dim=c.qk_head_dim, qk_rope_head_dim=c.qk_pos_emb_head_dim, v_head_dim=c.v_head_dim)
        return forms(MLA(kv_lora_rank=c.kv_lora_rank, **sizes))[0] == "absorbed"

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
        cu_seqlens = cu_seqlens_of(packed_seq_params)
        q_latent, kv, turn = self.latents(hidden_states, cu_seqlens)
        options = dict(scale=self.softmax_scale, cu_seqlens=cu_seqlens)
        out = (self._absorbed if self.absorbed else self._expanded)(q_latent, kv, turn, options)
        if self.qkv_up_checkpoint is not None:  # mla_up_proj: what it made is discarded, and made again when needed
            self.qkv_up_checkpoint.discard_output_and_register_recompute(out)
            self.qkv_up_checkpoint = None
        return self.linear_proj(out)

    def latents(
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """This rank's q latents [S/tp, B, Lq] and kv latents with rope key [S/tp, B, L + Dr], normed and rotated.

        Then how `mla_queries` rotates: cos, sin and positions, of all tokens.
        """
        q_latent, kv = self._qkv_down_projection(hidden_states)
        rows, batch, _ = kv.shape
        shards, shard = (self.tp_group.size(), self.tp_group.rank()) if self.config.sequence_parallel else (1, 0)
        length, mine = rows * shards, (shard * rows, (shard + 1) * rows)
        turn = dict(zip(("cos", "sin"), _tables(length, self._rotation(), kv.device)), positions=None)
        # tokens of all sequences are one row in Megatron's order, so that nothing is transposed
        positions = None
        if cu_seqlens is not None:
            turn["positions"] = positions_of(cu_seqlens, length)
            positions = turn["positions"][slice(*mine)]
        elif shards * batch > 1:
            positions = _positions(*mine, batch, kv.device)
        weights = {
            f"{name}_weight": None if isinstance(norm, IdentityOp) else awaited(norm).weight
            for name, norm in (("q", self.q_layernorm), ("kv", self.kv_layernorm))
        }
        q_latent, kv = mla_latents(
            q_latent.reshape(1, rows * batch, -1),
            kv.reshape(1, rows * batch, -1),
            **turn | {"positions": positions},
            **weights,
            eps=getattr(self.kv_layernorm, "eps", getattr(self.q_layernorm, "eps", 0.0)),
            kernel=self.kernels.get("mla_latents"),
        )
        return q_latent.view(rows, batch, -1), kv.view(rows, batch, -1), turn

    def _rotation(self) -> tuple[int, float, Yarn | None]:
        c, yarn = self.config, None
        if c.rope_type == "yarn":
            yarn = Yarn(
                scaling_factor=c.rotary_scaling_factor,
                original_max_position_embeddings=c.original_max_position_embeddings,
                beta_fast=c.beta_fast,
                beta_slow=c.beta_slow,
                mscale=c.mscale,
                mscale_all_dim=c.mscale_all_dim,
            )
        return c.qk_pos_emb_head_dim, c.rotary_base, yarn

    def _queries(self, q_latent: torch.Tensor, up: torch.Tensor | None, turn: dict[str, Any]) -> torch.Tensor:
        """[B, S, H, Dn + Dr], or with up [B, S, H, L + Dr]."""
        q, _ = self.linear_q_up_proj(q_latent)
        q = q.unflatten(-1, (-1, self.q_head_dim)).transpose(0, 1)
        return mla_queries(q, **turn, up=up, kernel=self.kernels.get("mla_queries"))

    def _absorbed(
        self, q_latent: torch.Tensor, kv: torch.Tensor, turn: dict[str, Any], options: dict[str, Any]
    ) -> torch.Tensor:
        """[S, B, H · Dv]. linear_kv_up_proj's weight is two, by which queries and outputs are multiplied."""
        c = self.config
        weight = awaited(self.linear_kv_up_proj).weight.unflatten(0, (-1, c.qk_head_dim + c.v_head_dim))
        up, value_up = weight.split([c.qk_head_dim, c.v_head_dim], dim=1)  # [H, Dn, L], [H, Dv, L]
        kernel = self.kernels.get("latent_attention")

        def core(q: torch.Tensor, kv: torch.Tensor, value_up: torch.Tensor) -> torch.Tensor:
            out = latent_attention(q, kv.transpose(0, 1), value_dim=c.kv_lora_rank, **options, kernel=kernel)
            return _ValueUp.apply(out, value_up).flatten(2)

        # weights are arguments: a function that is run again would add up its part of their gradients by itself
        q = self._remade(lambda q_latent, up: self._queries(q_latent, up, turn), q_latent, up)
        return self._core(core, q, self._of_all_ranks(kv), value_up)

    def _expanded(
        self, q_latent: torch.Tensor, kv: torch.Tensor, turn: dict[str, Any], options: dict[str, Any]
    ) -> torch.Tensor:
        """[S, B, H · Dv]."""
        c = self.config
        latent, k_rope = kv.split([c.kv_lora_rank, c.qk_pos_emb_head_dim], dim=-1)
        kernel = self.kernels.get("mla_attention")

        def project(q_latent: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self._queries(q_latent, None, turn), self.linear_kv_up_proj(latent)[0]

        def core(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
            kv = kv.unflatten(-1, (-1, c.qk_head_dim + c.v_head_dim)).transpose(0, 1)
            k_nope, v = kv.split([c.qk_head_dim, c.v_head_dim], dim=-1)
            out = mla_attention(q, k_nope, k_rope.transpose(0, 1), v, **options, kernel=kernel)
            return out.flatten(2).transpose(0, 1).contiguous()

        q, kv = self._remade(project, q_latent, latent.contiguous())  # contiguous: Megatron may gather it
        return self._core(core, q, kv, self._of_all_ranks(k_rope))

    def _of_all_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """x [S/tp or S, B, .] of all tokens, whose gradient is the sum over all ranks' heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _remade(self, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """function(*inputs), under recompute of mla_up_proj without what it gives: `forward` discards that."""
        if not (self.recompute_up_proj and self.training):
            return function(*inputs)
        self.qkv_up_checkpoint = again = CheckpointWithoutOutput(fp8=None)  # False would count as fp8
        return again.checkpoint(function, *inputs)

    def _core(self, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """function(*inputs), under recompute of core_attn with nothing kept but inputs and output."""
        if not (self.checkpoint_core_attention and self.training):
            return function(*inputs)
        return checkpoint(function, False, *inputs)


class _ValueUp(torch.autograd.Function):
    """out [B, S, H, L], weight [H, Dv, L] -> out · weight[h]ᵀ as [S, B, H, Dv]: products that write where it belongs."""

    @staticmethod
    def forward(ctx, out, weight):
        ctx.save_for_backward(out, weight)
        batch, length, heads, _ = out.shape
        y = out.new_empty(length, batch, heads, weight.shape[1])
        for b in range(batch):
            torch.bmm(out[b].transpose(0, 1), weight.mT, out=y[:, b].transpose(0, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        out, weight = ctx.saved_tensors
        d_out = out.new_empty(out.shape)
        d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
        for b in range(out.shape[0]):
            rows = dy[:, b].transpose(0, 1)  # [H, S, Dv]
            torch.bmm(rows, weight, out=d_out[b].transpose(0, 1))
            d_weight += torch.bmm(rows.mT, out[b].transpose(0, 1))
        return d_out, d_weight.to(weight.dtype)


@lru_cache(maxsize=32)  # as many lengths as Megatron's own rotary embedding keeps
def _tables(
    length: int, rotation: tuple[int, float, Yarn | None], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, one pair for all layers."""
    dim, theta, yarn = rotation
    with torch.inference_mode(False):  # evaluation may come first, and training couldn't keep its tensors
        return rope_tables(length, dim, theta, yarn=yarn, device=device)


@lru_cache(maxsize=32)
def _positions(start: int, stop: int, batch: int, device: torch.device) -> torch.Tensor:
    """Each token's place where batch sequences lie side by side: [(stop − start) · batch] int32."""
    with torch.inference_mode(False):
        return torch.arange(start, stop, dtype=torch.int32, device=device).repeat_interleave(batch)


def awaited(module: torch.nn.Module) -> torch.nn.Module:
    """The module, of which the weights are used and not the forward: what waits for them before it is run.

    Megatron's DDP gathers the distributed optimizer's weights behind the forward, and waits in each module's pre-hook.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module
