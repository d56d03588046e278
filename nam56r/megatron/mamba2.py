"""The M slots of kind mamba2: Megatron's own MambaMixer, on the plan's kernels.

Megatron's mixer runs mamba-ssm's kernels and can't be built without them. The patches of `patches.py` let it be built,
put `training_scan` in place of its step through convolution and scan, and `GatedRMSNorm` in place of mamba-ssm's. That
holds for Megatron's own stack spec too. Parameters, their names, their initial values and checkpoints are Megatron's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nam56r.kernels.conv1d import causal_conv1d
from nam56r.kernels.mamba2 import mamba2_scan
from nam56r.kernels.mamba2.combined import gated_rms_norm
from nam56r.megatron.attention import cu_seqlens_of
from nam56r.megatron.linear import KeepsFloat32


class Mamba2Mixer(KeepsFloat32, MambaMixer):
    """hidden [S, B, D] -> ([S, B, D], None). MambaMixer, whose parameters of the scan stay fp32."""

    FLOAT32 = ("A_log", "dt_bias", "D")


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm over the channels of each group, of x or of x ⊙ silu(z); in the form of mamba-ssm's.

    Its weight is a tensor-parallel rank's part: ranks have whole groups.
    """

    tp_group: torch.distributed.ProcessGroup  # which MambaMixer sets

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, **where: Any):
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate is True, but must be False: the gate comes before the norm here")
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **where))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return gated_rms_norm(x, self.weight, z, group_size=self.group_size, eps=self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def training_scan(
    mixer: MambaMixer, projected: torch.Tensor, packed_seq_params: PackedSeqParams | None = None
) -> torch.Tensor:
    """In place of MambaMixer._ssm_training: projected [S, B, z | x | B | C | dt] -> [S, B, H·P], gated and normed.

    The convolution and the scan read slices in place; the norm writes [S, B, H·P] for the output projection.
    """
    cp, kernels, cu_seqlens = mixer.cp, kernels_of(mixer), cu_seqlens_of(packed_seq_params)
    inner, states, heads = cp.d_inner_local_tpcp, cp.ngroups_local_tpcp * mixer.d_state, cp.nheads_local_tpcp
    z, mixed, dt = projected.split([inner, inner + 2 * states, heads], dim=-1)
    mixed, _ = causal_conv1d(
        mixed.transpose(0, 1),
        cp.get_conv1d_weight().squeeze(1),
        cp.get_conv1d_bias(),
        activation="silu",
        cu_seqlens=cu_seqlens,
        kernel=kernels.get("causal_conv1d"),
    )
    x, B, C = mixed.split([inner, states, states], dim=-1)
    D = _wide(cp.get_D())
    y, _ = mamba2_scan(
        x.unflatten(-1, (heads, -1)),
        dt.transpose(0, 1),
        -_wide(cp.get_A_log()).exp(),
        B.unflatten(-1, (-1, mixer.d_state)),
        C.unflatten(-1, (-1, mixer.d_state)),
        D.unflatten(0, (heads, -1)) if mixer.D_has_hdim else D,
        z.transpose(0, 1).unflatten(-1, (heads, -1)),
        _wide(cp.get_dt_bias()),
        dt_softplus=True,
        cu_seqlens=cu_seqlens,
        kernel=kernels.get("mamba2_scan"),
    )
    y = cp.post_conv_ssm(y.flatten(2).transpose(0, 1), packed_seq_params)
    return mixer.norm(y) if mixer.rmsnorm else y


def kernels_of(mixer: MambaMixer) -> Mapping[str, str]:
    """What the plan that the configuration carries chose for the mixer's slot, by operator; nothing without a plan."""
    plan = getattr(mixer.config, "plan", None)
    return {} if plan is None else plan.slots[mixer.layer_number - 1].kernels


def _wide(t: torch.Tensor) -> torch.Tensor:
    """In fp32 at least: Megatron's own stack has the scan's parameters in 16 bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
