"""Mamba-3's scan and one step of it, SISO and MIMO (arXiv 2603.15569): trapezoid, rotated B and C, no convolution."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes
from nam56r.kernels.mamba3 import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.mamba3.state import Mamba3State
from nam56r.kernels.registry import Problem, select


def mamba3_scan(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    log_decay: torch.Tensor,
    trap: torch.Tensor,
    angles: torch.Tensor,
    B_bias: torch.Tensor,
    C_bias: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    initial_state: Mamba3State | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, Mamba3State]:
    """Per batch row and head, with λ = sigmoid(trap), α = exp(log_decay), β = (1 − λ) dt α, γ = λ dt:

        θ_t = (θ_{t-1} + π tanh(angle_t) dt_t) mod 2π
        k_t, q_t = rotate(B_t + B_bias, θ_t), rotate(C_t + C_bias, θ_t)
        S_t = α_t S_{t-1} + β_t Σ_r v_{t-1,r} k_{t-1,r}ᵀ + γ_t Σ_r v_{t,r} k_{t,r}ᵀ
        y_{t,r} = S_t q_{t,r} + D v_{t,r}

    SISO (mimo None, R = 1): v = x, and the result is y ⊙ silu(z); rotate turns the pairs (2i, 2i + 1).
    MIMO (mimo = Ψ, ζ, Φ): v_r = x ⊙ Ψ_r, and the result is Σ_r Φ_r ⊙ y_r ⊙ silu(z ⊙ ζ_r); rotate turns the pairs
    (i, i + N / 2). Both turn N_a pairs, i < N_a, counterclockwise, and leave the rest. Without z there is no gate.

    x                [B, S, H, P]             bf16, fp16, fp32 or fp64
    B, C             [B, S, R, G, N]          x's dtype, normalised already; head h reads group h // (H / G)
    dt, log_decay    [B, H, S]                any of these dtypes; dt after its softplus, log_decay = A dt ≤ 0
    trap             [B, H, S]                before the sigmoid
    angles           [B, S, H or 1, N_a]      before the tanh; 1 is shared over heads; N even, N_a ≤ N / 2
    B_bias, C_bias   [H, R, N]
    D                [H]
    z                [B, S, H, P]             x's dtype
    mimo             Ψ, ζ, Φ, each [H, R, P]
    initial_state    a Mamba3State, n rows; zero if None. n is B, or the sequences packed
    cu_seqlens       [n + 1]                  int32, the packed sequences' bounds in S (B is 1); empty ones are allowed
    kernel           a name from the registry; None takes the first that accepts the problem

    Returns y [B, S, H, P] in x's dtype and the final Mamba3State, with gradients through both.
    The kernel `cuda` takes bf16 and fp16, R 1, 2, 4, 8, P 32, 64, 128, N 32, 64, 128, 256, N_a N / 4,
    at most 65535 sequences (n), on compute capability 9.0. It rounds the biases to x's dtype.
    A problem (what a kernel's `refuses` is asked) names psi, zeta and phi, and initial_state by its ssm.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    sizes = Shapes("mamba3_scan")
    arguments = {"x": x, "B": B, "C": C, "dt": dt, "log_decay": log_decay, "trap": trap, "angles": angles}
    arguments |= {"B_bias": B_bias, "C_bias": C_bias, "D": D, "z": z}
    psi, zeta, phi = _bind(sizes, "B S", "B H S", mimo, **arguments)
    rows = sizes.packed(cu_seqlens)
    if initial_state is not None:
        _bind_state(sizes, "initial_state", initial_state, str(rows), FLOATS)
    arguments["cu_seqlens"] = cu_seqlens
    ssm = initial_state and initial_state.ssm
    problem = Problem.of("mamba3_scan", **arguments, psi=psi, zeta=zeta, phi=phi, initial_state=ssm)
    return select(problem, kernel).run(**arguments, mimo=mimo, initial_state=initial_state)


def mamba3_step(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    log_decay: torch.Tensor,
    trap: torch.Tensor,
    angles: torch.Tensor,
    B_bias: torch.Tensor,
    C_bias: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    state: Mamba3State,
    out: Mamba3State | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, Mamba3State]:
    """One step of `mamba3_scan` for n sequences, for decoding: its equations for a single t. There are no gradients.

    x, z             [n, H, P]             bf16, fp16, fp32 or fp64
    B, C             [n, R, G, N]          x's dtype, normalised already
    dt, log_decay    [n, H]                any of these dtypes, as trap [n, H] and angles [n, H or 1, N_a]
    state            a Mamba3State, n rows, fp32 (fp64 for fp64 inputs): a scan's final state, or an earlier step's
    out              where the new state is written: like state, and contiguous. It may be state itself (a CUDA graph of
                     a step then goes on by one token with each replay), but must not overlap it otherwise
    The rest is as in mamba3_scan.

    Returns y [n, H, P] in x's dtype and the new Mamba3State, which is out where that is given.
    The kernel `triton` takes bf16, fp16, fp32, P up to 128, N up to 256, R up to 8, on compute capability 8.0 or later.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree, or when a gradient is
    asked for; NoKernel when no kernel takes the problem.
    """
    sizes = Shapes("mamba3_step")
    arguments = {"x": x, "B": B, "C": C, "dt": dt, "log_decay": log_decay, "trap": trap, "angles": angles}
    arguments |= {"B_bias": B_bias, "C_bias": C_bias, "D": D, "z": z}
    psi, zeta, phi = _bind(sizes, "n", "n H", mimo, **arguments)
    wide = (torch.promote_types(x.dtype, torch.float32),)
    _bind_state(sizes, "state", state, "n", wide)
    if out is not None:
        _bind_state(sizes, "out", out, "n", wide)
        for name, tensor in out._asdict().items():
            if not tensor.is_contiguous():
                raise ValueError(f"mamba3_step: out.{name} has strides {tensor.stride()}, but must be contiguous")
    tensors = arguments | {"psi": psi, "zeta": zeta, "phi": phi}
    if torch.is_grad_enabled():
        for name, tensor in (tensors | {f"state.{part}": t for part, t in state._asdict().items()}).items():
            if tensor is not None and tensor.requires_grad:
                remedy = "call it under torch.no_grad(), or call mamba3_scan"
                raise ValueError(f"mamba3_step: {name} requires a gradient, but a step has none: {remedy}")
    problem = Problem.of("mamba3_step", **tensors, state=state.ssm)
    return select(problem, kernel).run(**arguments, mimo=mimo, state=state, out=out)


def _bind(sizes, positions, scalars, mimo, *, x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z):
    """Check all but the states; gives Ψ, ζ, Φ. positions: what x, B, C, z, angles begin with; scalars: dt's shape."""
    sizes.bind("x", x, f"{positions} H P", FLOATS)
    sizes.bind("B", B, f"{positions} R G N", (x.dtype,))
    sizes.bind("C", C, f"{positions} R G N", (x.dtype,))
    sizes.divides("G", "H")
    for name, tensor in {"dt": dt, "log_decay": log_decay, "trap": trap}.items():
        sizes.bind(name, tensor, scalars, FLOATS)
    shared = isinstance(angles, torch.Tensor) and angles.ndim == x.ndim and angles.shape[-2] == 1
    sizes.bind("angles", angles, f"{positions} 1 N_a" if shared else f"{positions} H N_a", FLOATS)
    if sizes["N"] % 2 or 2 * sizes["N_a"] > sizes["N"]:
        raise ValueError(
            f"{sizes.operator}: angles turn N_a = {sizes['N_a']} pairs of N = {sizes['N']}, but N must be even and "
            f"N_a at most N / 2"
        )
    sizes.bind("B_bias", B_bias, "H R N", FLOATS)
    sizes.bind("C_bias", C_bias, "H R N", FLOATS)
    sizes.bind("D", D, "H", FLOATS)
    sizes.bind("z", z, f"{positions} H P", (x.dtype,), optional=True)
    if mimo is None and sizes["R"] != 1:
        raise ValueError(f"{sizes.operator}: mimo is None, but must be (psi, zeta, phi) when B has R = {sizes['R']}")
    if mimo is not None and not (isinstance(mimo, tuple) and len(mimo) == 3):
        raise TypeError(f"{sizes.operator}: mimo must be a tuple (psi, zeta, phi), each [H R P], or None")
    parts = mimo or (None, None, None)
    for name, tensor in zip(("psi", "zeta", "phi"), parts):
        sizes.bind(f"mimo's {name}", tensor, "H R P", FLOATS, optional=mimo is None)
    return parts


def _bind_state(sizes, name, state, rows, dtypes):
    """Check a Mamba3State of so many rows."""
    if not isinstance(state, Mamba3State):
        raise TypeError(f"{sizes.operator}: {name} is {type(state).__name__}, but must be a Mamba3State")
    for part, shape in {"ssm": "H P N", "k": "H R N", "v": "H R P", "angle": "H N_a"}.items():
        sizes.bind(f"{name}.{part}", getattr(state, part), f"{rows} {shape}", dtypes)
