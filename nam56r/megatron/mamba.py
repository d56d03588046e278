"""The M slots: the Mamba-3 mixer (arXiv 2603.15569) in Megatron's MambaLayer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from nam56r.kernels.mamba3 import mamba3_scan
from nam56r.kernels.norm import rms_norm
from nam56r.megatron.attention import cu_seqlens_of
from nam56r.megatron.config import Config, recipe_of
from nam56r.megatron.linear import KeepsFloat32


def dt_bias(heads: int, least: float = 1e-3, most: float = 0.1, floor: float = 1e-4) -> torch.Tensor:
    """softplus⁻¹(dt) for dt log-uniform in [least, most], at least floor; fp32 [heads]."""
    dt = torch.exp(torch.rand(heads) * (math.log(most) - math.log(least)) + math.log(least)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def log_decay_rate(raw: torch.Tensor) -> torch.Tensor:
    """A = −g(raw), at most −1e-4, with g(a) = 1 + a for a ≥ 0 and 1 / (1 − a) below; raw in fp32 or more."""
    return -torch.where(raw >= 0, 1 + raw, 1 / (1 - raw.clamp(max=0))).clamp(min=1e-4)


class Mamba3Mixer(KeepsFloat32, MegatronModule):
    """hidden [S, B, D] -> ([S, B, D], None).

    One projection gives z, x [H, P], B, C [G, R, N] (group-major, so that tensor-parallel ranks take whole groups),
    dt, A, trap [H] and N/4 angles shared by all heads. Ranks split heads and groups; each projects its part of the
    angles and all of them are gathered.

    The scan reads z and x in place: the projection's output stays [S, B, ·] as it is split, and the sections are seen
    as [B, S, ·] with row strides.
    """

    kernels: Mapping[str, str] = {}
    FLOAT32 = ("dt_bias", "B_bias", "C_bias", "D", "psi", "zeta", "phi")

    def __init__(
        self,
        config: Config,
        d_model: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config=config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        mamba, tp = recipe_of(config).mamba, self.tp_group.size()
        heads, angles = mamba.expand * d_model // mamba.headdim, mamba.d_state // 4
        for name, size in (("heads", heads), ("ngroups", mamba.ngroups), ("angles (d_state / 4)", angles)):
            if size % tp:
                raise ValueError(f"mamba: {name} = {size} don't divide over {tp} tensor-parallel ranks")
        self.heads, self.groups, self.angles = heads // tp, mamba.ngroups // tp, angles // tp
        self.headdim, self.d_state, self.rank = mamba.headdim, mamba.d_state, mamba.mimo_rank
        inner, states = self.heads * self.headdim, self.groups * self.rank * self.d_state
        self.sections = {
            "z": inner,
            "x": inner,
            "B": states,
            "C": states,
            "dt": self.heads,
            "A": self.heads,
            "trap": self.heads,
            "angles": self.angles,
        }
        linear = dict(config=config, bias=False, skip_bias_add=False, is_expert=False, tp_group=self.tp_group)
        self.in_proj = ColumnParallelLinear(
            d_model, sum(self.sections.values()) * tp, init_method=config.init_method, gather_output=False, **linear
        )
        self.out_proj = RowParallelLinear(
            heads * self.headdim,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **linear,
        )
        # every rank draws all heads' and keeps its own
        self.dt_bias = torch.nn.Parameter(dt_bias(heads).chunk(tp)[self.tp_group.rank()].clone())
        per_state, per_channel = (self.heads, self.rank, self.d_state), (self.heads, self.rank, self.headdim)
        self.B_bias = torch.nn.Parameter(torch.ones(per_state))
        self.C_bias = torch.nn.Parameter(torch.ones(per_state))
        self.D = torch.nn.Parameter(torch.ones(self.heads))
        mimo = self.rank > 1
        self.psi = torch.nn.Parameter(torch.full(per_channel, 1 / self.rank)) if mimo else None
        self.zeta = torch.nn.Parameter(torch.ones(per_channel)) if mimo else None
        self.phi = torch.nn.Parameter(torch.full(per_channel, 1 / self.rank)) if mimo else None
        self.split = [name for name in self.FLOAT32 if getattr(self, name) is not None]
        for name in self.split:
            parameter = getattr(self, name)
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
            parameter._no_weight_decay = True
        # shared by all groups, so every rank sees a part of their gradient
        self.B_norm = torch.nn.Parameter(torch.ones(self.d_state, dtype=config.params_dtype))
        self.C_norm = torch.nn.Parameter(torch.ones(self.d_state, dtype=config.params_dtype))
        for norm in (self.B_norm, self.C_norm):
            norm.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inference_context is not None:
            raise NotImplementedError("Mamba3Mixer trains; it has no inference path")
        projected, _ = self.in_proj(hidden_states)  # [S, B, ·], and so are its sections
        # one split: its backward is one concatenation
        z, x, B, C, dt, A, trap, angles = projected.split(list(self.sections.values()), dim=-1)
        if self.tp_group.size() > 1:
            angles = all_gather_last_dim_from_tensor_parallel_region(angles, group=self.tp_group)
        dt = F.softplus(dt + self.dt_bias)  # fp32, as dt_bias is
        log_decay = log_decay_rate(A.to(dt.dtype)) * dt
        y, _ = mamba3_scan(
            self._heads(x),
            self._states(B, self.B_norm),
            self._states(C, self.C_norm),
            dt.permute(1, 2, 0),
            log_decay.permute(1, 2, 0),
            trap.to(dt.dtype).permute(1, 2, 0),
            angles.transpose(0, 1).unsqueeze(2),
            self.B_bias,
            self.C_bias,
            self.D,
            self._heads(z),
            mimo=None if self.psi is None else (self.psi, self.zeta, self.phi),
            cu_seqlens=cu_seqlens_of(packed_seq_params),
            kernel=self.kernels.get("mamba3_scan"),
        )
        return self.out_proj(y.transpose(0, 1).flatten(2).contiguous())

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[S, B, H·P] -> [B, S, H, P], a view."""
        return x.unflatten(-1, (self.heads, self.headdim)).transpose(0, 1)

    def _states(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[S, B, G·R·N] -> [B, S, R, G, N], normed over N."""
        x = x.unflatten(-1, (self.groups, self.rank, self.d_state))
        x = rms_norm(x, weight, self.config.layernorm_epsilon, kernel=self.kernels.get("rms_norm"))
        return x.permute(1, 0, 3, 2, 4)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The projection's rows are kept as one tensor a section, so that another number of ranks can load them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, torch.Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(self.split, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        key = f"{prefix}in_proj.weight"
        # dimension 0 of the weight itself: prepended axes aren't counted
        sharded[key] = _split_tensor_factory(sharded[key], list(self.sections.values()), list(self.sections), 0)
        return sharded


# mamba_ssm.modules.mamba3.Mamba3's names -> ours
_MAMBA_SSM = {
    "in_proj.weight": "in_proj.weight",
    "dt_bias": "dt_bias",
    "B_bias": "B_bias",
    "C_bias": "C_bias",
    "B_norm.weight": "B_norm",
    "C_norm.weight": "C_norm",
    "mimo_x": "psi",
    "mimo_z": "zeta",
    "mimo_o": "phi",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}


def from_mamba_ssm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a whole Mamba3Mixer (one tensor-parallel rank) from that of mamba_ssm.modules.mamba3.Mamba3.

    Every parameter is the same but in_proj's rows of B and C: rank-major there, group-major here. Both then compute the
    same where norm_eps is 1e-5 and that module's A is as here: since its commit c69aaab (June 2026); up to version
    2.3.2 it was −softplus, to which these weights don't carry over.
    Raises ValueError, naming all that is wrong: parameters of options that we don't have (is_outproj_norm, MIMO of rank
    1, rope_fraction 1.0), or missing ones.
    """
    return {_MAMBA_SSM[name]: value for name, value in _regrouped(state, _MAMBA_SSM, group_major=True).items()}


def to_mamba_ssm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back: what `from_mamba_ssm` takes. Raises ValueError for what isn't a whole Mamba3Mixer's."""
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}  # Megatron's, and empty
    ours = {name: name for name in _MAMBA_SSM.values()}
    theirs = {name: key for key, name in _MAMBA_SSM.items()}
    return {theirs[name]: value for name, value in _regrouped(state, ours, group_major=False).items()}


def _regrouped(
    state: Mapping[str, torch.Tensor], names: Mapping[str, str], *, group_major: bool
) -> dict[str, torch.Tensor]:
    """A state dict, checked, with in_proj's rows of B and C in the other order. names: what it calls things -> ours."""
    mimo = [name for name, ours in names.items() if ours in ("psi", "zeta", "phi")]
    rank = state["B_bias"].shape[1] if "B_bias" in state else 1
    wanted = [name for name in names if name not in mimo or rank > 1 or name in state]
    faults = [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} has no counterpart" for name in state if name not in wanted]
    if not faults:
        weight = state["in_proj.weight"]
        heads, d_state, inner = *state["B_bias"].shape[::2], state["out_proj.weight"].shape[1]
        rest = weight.shape[0] - 2 * inner - 3 * heads - d_state // 4
        groups, odd = divmod(rest, 2 * rank * d_state)
        if odd or groups < 1:
            faults.append(
                f"in_proj.weight has {weight.shape[0]} rows, which z, x [{inner}], dt, A, trap [{heads}] and "
                f"{d_state // 4} angles don't leave whole groups of B and C [{rank} · {d_state}] of: rope_fraction must "
                "be 0.5"
            )
        if rank == 1 and mimo[0] in state:
            faults.append(f"{mimo[0]} of rank 1: MIMO turns other pairs than SISO, which rank 1 is here")
    if faults:
        raise ValueError(f"Mamba-3 state dict: {'; '.join(faults)}")
    states = groups * rank * d_state
    z_x, *B_C, tail = weight.split([2 * inner, states, states, weight.shape[0] - 2 * (inner + states)])
    order = (rank, groups) if group_major else (groups, rank)
    B_C = [rows.unflatten(0, (*order, d_state)).transpose(0, 1).flatten(0, 2) for rows in B_C]
    return {**state, "in_proj.weight": torch.cat([z_x, *B_C, tail])}
