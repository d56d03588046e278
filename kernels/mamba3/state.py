"""What a Mamba-3 scan starts from and leaves behind."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Mamba3State(NamedTuple):
    """What a sequence leaves behind; n is B, or the number of packed sequences. All fp32 (fp64 for fp64 inputs).

    ssm    [n, H, P, N]  the state S
    k      [n, H, R, N]  the last k, bias added and rotated
    v      [n, H, R, P]  the last v: x, or x ⊙ Ψ_r
    angle  [n, H, N_a]   the last rotation angle in radians, in [0, 2π)
    """

    ssm: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    angle: torch.Tensor
