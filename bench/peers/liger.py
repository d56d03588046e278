"""Liger-Kernel (github.com/linkedin/Liger-Kernel). Its fused head reduces the loss inside, so it is no peer of ours."""

from __future__ import annotations

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel


def rms_norm(x, weight, eps, residual):
    from liger_kernel.transformers.functional import liger_rms_norm

    s = x if residual is None else x + residual
    y = liger_rms_norm(s, weight, eps, in_place=False)  # in place it would write over the incoming gradient
    return y if residual is None else (y, s)


KERNELS = (Kernel("rms_norm", "peer:liger", rms_norm, not_installed("liger_kernel"), role="peer"),)
