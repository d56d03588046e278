"""What a slot asks of each of its operators: arguments as `Spec`s and options, at a recipe's shapes, on one rank.

Names are the public operators' own. B is the micro-batch, S the sequence; tensor parallelism splits heads and groups,
and leaves what Megatron or we keep whole on every rank: the DSA indexer and its loss, the routed experts, M²RNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nam56r import flops
from nam56r.kernels.registry import Spec
from nam56r.parameters import MAMBA2_CONV
from nam56r.recipe import MLA, Recipe

Arguments = dict[str, Any]
ATTENTION = {"absorbed": "latent_attention", "expanded": "mla_attention"}  # form of dense MLA -> operator


def forms(mla: MLA) -> tuple[str, str]:
    """Both forms of dense MLA, better first: absorbed unless it takes more FLOPs, since it writes and reads no K and V."""
    score = flops.mla_score(mla)
    absorbed_first = score["absorbed"] <= score["expanded"]
    return ("absorbed", "expanded") if absorbed_first else ("expanded", "absorbed")


@dataclass(frozen=True)
class Workload:
    """A recipe as one rank meets it."""

    recipe: Recipe
    micro_batch: int
    tensor_parallel: int
    dtype: torch.dtype

    def operators(self, role: str, *, indexer: bool = True, form: str | None = None) -> dict[str, Arguments]:
        """Arguments by operator for a slot's role, or for "mtp" and "head".

        indexer: the layer computes indices. form: of dense MLA, a key of ATTENTION; None for the better one.
        """
        split = {"rms_norm": self._rms_norm()}
        if role in ("mla", "mtp"):
            split |= self._mla(form or forms(self.recipe.mla)[0])
        if role == "dsa":
            split |= self._dsa(indexer)
        if role == "moe":
            split["moe_experts"] = self._moe()
        if role == "mamba3":
            split["mamba3_scan"] = self._mamba3()
        if role == "mamba2":
            split |= self._mamba2()
        if role == "m2rnn":
            split |= self._m2rnn()
        if role in ("mtp", "head"):
            split["linear_cross_entropy"] = self._cross_entropy()
        return split

    def expanded_bytes(self) -> int:
        """Of the K and V that one layer of the expanded form writes, and the absorbed one doesn't."""
        a = self.recipe.mla
        row = a.num_heads // self.tensor_parallel * (a.qk_nope_head_dim + a.v_head_dim)
        return self.micro_batch * self.recipe.seq_length * row * self.dtype.itemsize

    def indivisible(self, role: str, *, form: str | None = None) -> Iterator[tuple[str, str]]:
        """(operator, reason) for everything of a role that doesn't divide by the tensor-parallel size."""
        r, a, m = self.recipe, self.recipe.mla, self.recipe.mamba
        dense = ATTENTION[form or forms(a)[0]]
        attention = {
            "mla.num_heads": a.num_heads,
            "mla.q_lora_rank": a.q_lora_rank,
            "mla.kv_lora_rank + mla.qk_rope_head_dim": a.kv_lora_rank + a.qk_rope_head_dim,
        }
        scan = {"the number of Mamba heads": r.mamba_heads, "mamba.ngroups": m.ngroups}
        vocabulary = {"linear_cross_entropy": {"vocab_size": r.vocab_size}}
        split = {
            "mla": {dense: attention},
            "dsa": {"sparse_latent_attention": attention},
            "moe": {"moe_experts": {"moe.shared_ffn_hidden_size": r.moe.shared_ffn_hidden_size}},
            "mamba3": {"mamba3_scan": scan | {"mamba.d_state / 4": m.d_state // 4}},
            "mamba2": {"mamba2_scan": scan},
            "m2rnn": {},
            "mtp": {dense: attention, "mlp": {"ffn_hidden_size": r.ffn_hidden_size}} | vocabulary,
            "head": vocabulary,
        }
        for operator, sizes in split[role].items():
            for name, count in sizes.items():
                if count % self.tensor_parallel:
                    yield operator, f"{name} = {count} doesn't divide by tensor_parallel = {self.tensor_parallel}"

    def _of(self, *shape: int, dtype: torch.dtype | None = None) -> Spec:
        return Spec(shape, dtype or self.dtype)

    def _tokens(self, *shape: int, dtype: torch.dtype | None = None) -> Spec:
        return self._of(self.micro_batch, self.recipe.seq_length, *shape, dtype=dtype)

    def _rms_norm(self) -> Arguments:
        d = self.recipe.hidden_size
        return {"x": self._tokens(d), "weight": self._of(d), "residual": None}

    def _mla(self, form: str) -> dict[str, Arguments]:
        a, tp = self.recipe.mla, self.tensor_parallel
        heads, nope, rope, latent = a.num_heads // tp, a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank
        table = self._of(self.recipe.seq_length, rope // 2, dtype=torch.float32)
        turn = {"cos": table, "positions": None, "interleaved": True}
        # one row in Megatron's order, all sequences' first tokens first; under sequence parallelism a part of it
        row = self.recipe.seq_length * self.micro_batch // tp
        latents = turn | {
            "kv": self._of(1, row, latent + rope),
            "q_latent": self._of(1, row, a.q_lora_rank),
            "q_weight": self._of(a.q_lora_rank),
            "kv_weight": self._of(latent),
            "positions": self._of(row, dtype=torch.int32) if tp * self.micro_batch > 1 else None,
        }
        absorbed = form == "absorbed"
        queries = turn | {
            "q": self._tokens(heads, nope + rope),
            "up": self._of(heads, nope, latent) if absorbed else None,
        }
        masking = {"causal": True, "cu_seqlens": None, "query_offset": 0, "return_lse": False}
        if absorbed:
            attention = {
                "q": self._tokens(heads, latent + rope),
                "kv": self._tokens(latent + rope),
                "value_dim": latent,
            }
        else:
            attention = {
                "q": self._tokens(heads, nope + rope),
                "k_nope": self._tokens(heads, nope),
                "k_rope": self._tokens(rope),
                "v": self._tokens(heads, a.v_head_dim),
            }
        return {"mla_latents": latents, "mla_queries": queries, ATTENTION[form]: attention | masking}

    def _dsa(self, indexer: bool) -> dict[str, Arguments]:
        a, s = self.recipe.mla, self.recipe.dsa
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        index_q = self._tokens(s.index_num_heads, s.index_head_dim)
        index_k = self._tokens(s.index_head_dim)
        index_weights = self._tokens(s.index_num_heads)
        heads = a.num_heads // self.tensor_parallel
        q, kv = self._tokens(heads, latent), self._tokens(latent)
        indices = self._tokens(s.top_k, dtype=torch.int32)
        attention = {"q": q, "kv": kv, "indices": indices, "value_dim": a.kv_lora_rank}
        if not indexer:
            return {"sparse_latent_attention": attention}
        top_k = {"q": index_q, "k": index_k, "weights": index_weights, "top_k": s.top_k, "cu_seqlens": None}
        asked = {"index_top_k": top_k, "sparse_latent_attention": attention}
        if s.loss_coeff:
            asked["indexer_kl_loss"] = {
                "index_q": index_q,
                "index_k": index_k,
                "index_weights": index_weights,
                "q": self._tokens(a.num_heads, latent),
                "kv": kv,
                "indices": indices,
                "lse": self._tokens(a.num_heads, dtype=torch.float32),
            }
        return asked

    def _moe(self) -> Arguments:
        e, d = self.recipe.moe, self.recipe.hidden_size
        tokens = self.micro_batch * self.recipe.seq_length
        return {
            "x": self._of(tokens, d),
            "expert_ids": self._of(tokens, e.top_k, dtype=torch.int32),
            "gates": self._of(tokens, e.top_k, dtype=torch.float32),
            "w_up": self._of(e.num_experts, e.ffn_hidden_size, d),
            "w_down": self._of(e.num_experts, d, e.ffn_hidden_size),
            "activation": "relu2",
        }

    def _mamba3(self) -> Arguments:
        m, fp32 = self.recipe.mamba, torch.float32
        heads, groups = self.recipe.mamba_heads // self.tensor_parallel, m.ngroups // self.tensor_parallel
        rank, batch, seq = m.mimo_rank, self.micro_batch, self.recipe.seq_length
        per_head = self._of(batch, heads, seq, dtype=fp32)
        mixing = self._of(heads, rank, m.headdim, dtype=fp32) if rank > 1 else None
        bias = self._of(heads, rank, m.d_state, dtype=fp32)
        return {
            "x": self._tokens(heads, m.headdim),
            "B": self._tokens(rank, groups, m.d_state),
            "C": self._tokens(rank, groups, m.d_state),
            "dt": per_head,
            "log_decay": per_head,
            "trap": per_head,
            "angles": self._tokens(1, m.d_state // 4),
            "B_bias": bias,
            "C_bias": bias,
            "D": self._of(heads, dtype=fp32),
            "z": self._tokens(heads, m.headdim),
            "cu_seqlens": None,
            "psi": mixing,
            "zeta": mixing,
            "phi": mixing,
            "initial_state": None,
        }

    def _mamba2(self) -> dict[str, Arguments]:
        m, fp32 = self.recipe.mamba, torch.float32
        heads, groups = self.recipe.mamba_heads // self.tensor_parallel, m.ngroups // self.tensor_parallel
        scan = {
            "x": self._tokens(heads, m.headdim),
            "dt": self._tokens(heads),
            "A": self._of(heads, dtype=fp32),
            "B": self._tokens(groups, m.d_state),
            "C": self._tokens(groups, m.d_state),
            "D": self._of(heads, dtype=fp32),
            "z": self._tokens(heads, m.headdim),
            "dt_bias": self._of(heads, dtype=fp32),
            "dt_softplus": True,
            "initial_state": None,
            "cu_seqlens": None,
        }
        mixed = heads * m.headdim + 2 * groups * m.d_state
        return {"causal_conv1d": self._conv(mixed, MAMBA2_CONV, bias=True), "mamba2_scan": scan}

    def _m2rnn(self) -> dict[str, Arguments]:
        r = self.recipe.m2rnn
        heads, key, value = r.num_heads, r.k_head_dim, r.v_head_dim
        scan = {
            "q": self._tokens(1, key),
            "k": self._tokens(1, key),
            "v": self._tokens(heads, value),
            "weight": self._of(heads, value, value, dtype=torch.float32),
            "forget": self._tokens(heads, dtype=torch.float32),
            "initial_state": None,
            "cu_seqlens": None,
        }
        return {"causal_conv1d": self._conv(2 * key + heads * value, r.conv_width), "m2rnn": scan}

    def _conv(self, channels: int, width: int, *, bias: bool = False) -> Arguments:
        return {
            "x": self._tokens(channels),
            "weight": self._of(channels, width),
            "bias": self._of(channels) if bias else None,
            "activation": "silu",
            "initial_state": None,
            "cu_seqlens": None,
        }

    def _cross_entropy(self) -> Arguments:
        tokens = self.micro_batch * self.recipe.seq_length
        return {
            "hidden": self._of(tokens, self.recipe.hidden_size),
            "weight": self._of(self.recipe.vocab_size // self.tensor_parallel, self.recipe.hidden_size),
            "labels": self._of(tokens, dtype=torch.int64),
            "z_loss": 0.0,
        }
