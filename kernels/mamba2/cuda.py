"""Mamba-2's scan on the kernels of csrc/ssd."""

from __future__ import annotations

import torch

from nam56r.kernels.ssd import cuda


def mamba2_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nam56r.kernels.mamba2.mamba2_scan`."""
    y, final, *_ = cuda.scan(
        x, B.unsqueeze(2), C.unsqueeze(2), dt.transpose(1, 2), A=A, dt_bias=dt_bias, softplus=dt_softplus, D=D, z=z,
        state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return y, final
