"""mamba-ssm (github.com/state-spaces/mamba): Mamba-2 and Mamba-3 SISO in Triton, Mamba-3 MIMO in TileLang 0.1.8.

It is called as its own layers call it in training: chunks of 128 (Mamba-2), 64 (SISO) and 64 / R (MIMO) tokens, no final
state asked for, so the final state given here is None. Its MIMO returns the last x as it came and no gradients of
states, so MIMO starts from zero states only. SISO reads all but dt, log_decay and the parameters in bf16, whatever it is
given, so Mamba-3 is asked for in bf16 only. With trap and angles in bf16 too nothing is cast but MIMO's angles, to fp32.

First calls: Mamba-2 and SISO time tens of configurations for each of their kernels, once for all lengths and again for
packed sequences (SISO) or another N or P. MIMO compiles three kernels anew for every B, S, H and G, and another three for
packed sequences of any length.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import sys
from typing import Any

import torch

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel, Problem

TILELANG = "0.1.8"  # what mamba-ssm names; its MIMO backward does not compile with 0.1.15


def _module(name: str) -> Any:
    """mamba_ssm.<name>, without the package's __init__, which imports every model and a compiled CUDA module."""
    if "mamba_ssm" not in sys.modules:
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(importlib.util.find_spec("mamba_ssm"))
    return importlib.import_module(f"mamba_ssm.{name}")


def mamba2_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens):
    sequence = None
    if cu_seqlens is not None:  # the sequence each token is of: [1, S]
        tokens = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True, out_int32=True)[None]
    y = _module("ops.triton.ssd_combined").mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=128,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_state,
        seq_idx=sequence,
        dt_softplus=dt_softplus,
    )
    return y, None


def mamba3_scan(
    x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, cu_seqlens, *, mimo=None, initial_state=None
):
    shared = {"V": x, "ADT": log_decay, "DT": dt, "Trap": trap.to(x.dtype), "D": D, "Z": z, "cu_seqlens": cu_seqlens}
    if mimo is None:
        state = None
        if initial_state is not None:
            state = (initial_state.angle, initial_state.ssm, initial_state.k.squeeze(2), initial_state.v.squeeze(2))
        y = _module("ops.triton.mamba3.mamba3_siso_combined").mamba3_siso_combined(
            Q=C.squeeze(2),
            K=B.squeeze(2),
            Q_bias=C_bias.squeeze(1),
            K_bias=B_bias.squeeze(1),
            Angles=angles.to(x.dtype).expand(-1, -1, x.shape[2], -1),
            Input_States=state,
            chunk_size=64,
            **shared,
        )
        return y, None
    psi, zeta, phi = mimo
    y = _module("ops.tilelang.mamba3.mamba3_mimo").mamba3_mimo(
        Q=C,
        K=B,
        Q_bias=C_bias,
        K_bias=B_bias,
        MIMO_V=psi,
        MIMO_Z=zeta,
        MIMO_Out=phi,
        Angles=angles.float().expand(-1, -1, x.shape[2], -1),
        chunk_size=64 // B.shape[2],
        rotary_dim_divisor=B.shape[-1] // angles.shape[-1],
        dtype=x.dtype,
        **shared,
    )
    return y, None


def _refuses_mamba2(problem: Problem) -> tuple[str, ...]:
    packed = problem["cu_seqlens"] is not None and problem["initial_state"] is not None
    return (
        *not_installed("mamba_ssm")(problem),
        *(("its Triton kernels don't compile for fp64",) if problem["x"].dtype == torch.float64 else ()),
        *(("takes no initial states of packed sequences",) if packed else ()),
    )


def _refuses_mamba3(problem: Problem) -> tuple[str, ...]:
    reasons = [*not_installed("mamba_ssm")(problem)]
    (_, S, H, P), (batch, _, R, _, N), pairs = problem["x"].shape, problem["B"].shape, problem["angles"].shape[-1]
    tensors = problem.specs
    if problem["x"].dtype != torch.bfloat16:
        reasons.append("computes in bf16 whatever it is given")
    if wrong := [name for name in ("dt", "log_decay", "B_bias", "C_bias", "D") if tensors[name].dtype != torch.float32]:
        reasons.append(f"wants {', '.join(wrong)} in fp32")
    if problem["psi"] is None:
        if odd := [f"{name} {size}" for name, size in (("N", N), ("P", P)) if size & (size - 1)]:
            reasons.append(f"its Triton kernels want powers of two, not {' and '.join(odd)}")
        return tuple(reasons)
    if importlib.util.find_spec("tilelang") is None:
        reasons.append(f"tilelang is not installed: MIMO needs {TILELANG}")
    elif (found := importlib.metadata.version("tilelang")) != TILELANG:
        reasons.append(f"tilelang is {found}: MIMO needs {TILELANG}")
    if problem["initial_state"] is not None:
        reasons.append("its MIMO takes no initial state")
    if N not in (2 * pairs, 4 * pairs):
        reasons.append(f"its MIMO turns N / 4 or N / 2 pairs, not {pairs} of N {N}")
    if R not in (1, 2, 4, 8):
        reasons.append(f"its MIMO takes rank 1, 2, 4 or 8, not {R}")
    if (each := math.prod((batch, S, R, H, N))) > 2**31:
        reasons.append(f"its 32-bit offsets don't reach all of the {each:,} elements of B's gradients by head")
    return tuple(reasons)


KERNELS = (
    Kernel("mamba2_scan", "peer:mamba-ssm", mamba2_scan, _refuses_mamba2, role="peer"),
    Kernel("mamba3_scan", "peer:mamba-ssm", mamba3_scan, _refuses_mamba3, role="peer"),
)
