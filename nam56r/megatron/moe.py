"""The E slots: Megatron's router and shared expert around our grouped experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from nam56r.kernels.moe import moe_experts

_NAMES = {"w_up": "linear_fc1", "w_down": "linear_fc2"}


class Experts(MegatronModule):
    """This rank's routed experts, relu², as two stacked weights: w_up [E, F, D] and w_down [E, D, F].

    In state dicts they carry the names and shapes of Megatron's SequentialMLP (local_experts.<i>.linear_fc1.weight, …),
    in distributed checkpoints its global tensors (experts.linear_fc1.weight [E, F, D]).
    """

    kernels: Mapping[str, str] = {}

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            self.w_up = self._stack(num_local_experts, width, hidden, config.init_method)
            self.w_down = self._stack(num_local_experts, hidden, width, config.output_layer_init_method)
        for parameter in (self.w_up, self.w_down):
            # experts are reduced over their own data-parallel group where that isn't everybody's
            parameter.allreduce = config.expert_model_parallel_size * config.tensor_model_parallel_size == 1  # type: ignore[attr-defined]

    def _stack(self, local: int, rows: int, columns: int, init: Callable[[torch.Tensor], Any]) -> torch.nn.Parameter:
        """[local, rows, columns] initialised; on a CPU, where ranks draw the same numbers, a slice of all experts."""
        config, rank = self.config, self.ep_group.rank()
        if config.use_cpu_initialization:
            every = torch.empty(self.ep_group.size() * local, rows, columns, dtype=config.params_dtype)
            init(every)
            return torch.nn.Parameter(every[rank * local : (rank + 1) * local].clone())
        weight = torch.empty(local, rows, columns, dtype=config.params_dtype, device="cuda")
        init(weight)
        return torch.nn.Parameter(weight)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Megatron's dispatched form: tokens [n, D] sorted by local expert, gates [n] -> ([n, D], None)."""
        counts = tokens_per_expert.to(tokens.device)
        experts = torch.arange(len(counts), dtype=torch.int32, device=tokens.device)
        ids = experts.repeat_interleave(counts, output_size=tokens.shape[0])
        return self.routed(tokens, ids[:, None], gates[:, None]), None

    def routed(self, tokens: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """tokens [T, D], expert_ids [T, K] int32 among this rank's, gates [T, K] -> [T, D]."""
        return moe_experts(
            tokens,
            expert_ids,
            gates,
            self.w_up,
            self.w_down,
            activation="relu2",
            kernel=self.kernels.get("moe_experts"),
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, linear in _NAMES.items():
            weight = getattr(self, name) if keep_vars else getattr(self, name).detach()
            for i in range(len(weight)):
                destination[f"{prefix}local_experts.{i}.{linear}.weight"] = weight[i]

    def _load_from_state_dict(
        self, state: dict, prefix: str, metadata: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        with torch.no_grad():
            for name, linear in _NAMES.items():
                if f"{prefix}{name}" in state:  # as sharded_state_dict gave it
                    getattr(self, name).copy_(state[f"{prefix}{name}"])
                    continue
                for i, weight in enumerate(getattr(self, name)):
                    key = f"{prefix}local_experts.{i}.{linear}.weight"
                    if key not in state:
                        missing.append(key)
                    elif state[key].shape != weight.shape:
                        errors.append(f"{key} is {list(state[key].shape)}, but must be {list(weight.shape)}")
                    else:
                        weight.copy_(state[key])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One global [E, F, D] and [E, D, F], split over the expert-parallel ranks along E."""
        along_experts = (len(sharded_offsets), self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{linear}.weight",
                getattr(self, name),
                *sharded_offsets,
                along_experts,
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, linear in _NAMES.items()
        }


class MoE(MoELayer):
    """Megatron's MoELayer. With all experts on the rank, tokens go to `moe_experts` as the router left them: no
    dispatcher, no host synchronisation. With expert parallelism Megatron's dispatcher moves them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.config.expert_model_parallel_size > 1:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._local, False, hidden_states, padding_mask), None
        return self._local(hidden_states, padding_mask), None

    def _local(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        shared = self.shared_experts_compute(hidden_states)
        probs, _ = self.route(hidden_states, padding_mask)  # [T, E], zero where not chosen
        gates, ids = probs.topk(self.config.moe_router_topk, dim=-1)
        out = self.experts.routed(hidden_states.flatten(0, 1), ids.int(), gates).view_as(hidden_states)
        return out if shared is None else out + shared
