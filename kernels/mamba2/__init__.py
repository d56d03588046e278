"""The scan of Mamba-2 (state space duality, Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.mamba2 import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


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
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_tᵀ,  y_t = (S_t C_t + D ⊙ x_t) ⊙ silu(z_t), per batch row and head.

    The same as mamba_ssm's mamba_chunk_scan_combined (any chunk length gives the same).

    x              [B, S, H, P]      bf16, fp16, fp32 or fp64
    dt             [B, S, H]         any of these dtypes; first + dt_bias, then softplus if dt_softplus
    A              [H]               negative
    B, C           [B, S, G, N]      x's dtype; head h reads group h // (H / G)
    D              [H] or [H, P]     skip; none if None
    z              [B, S, H, P]      x's dtype; gate; none if None
    dt_bias        [H]
    initial_state  [n, H, P, N]      S_0; zero if None. n is B, or the sequences packed
    cu_seqlens     [n + 1]           int32, the packed sequences' bounds in S (B is 1); empty ones are allowed
    kernel         a name from the registry; None takes the first that accepts the problem

    Returns y [B, S, H, P] in x's dtype and the final state [n, H, P, N] in fp32 (fp64 for fp64 inputs), with
    gradients through both.
    The kernel `cuda` takes bf16 and fp16, P 32, 64, 128, N 32, 64, 128, 256, at most 65535 sequences (n), on compute
    capability 9.0.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no kernel
    takes the problem.
    """
    sizes = Shapes("mamba2_scan")
    sizes.bind("x", x, "B S H P", FLOATS)
    sizes.bind("dt", dt, "B S H", FLOATS)
    sizes.bind("A", A, "H", FLOATS)
    sizes.bind("B", B, "B S G N", (x.dtype,))
    sizes.bind("C", C, "B S G N", (x.dtype,))
    sizes.divides("G", "H")
    sizes.bind("D", D, "H P" if isinstance(D, torch.Tensor) and D.ndim == 2 else "H", FLOATS, optional=True)
    sizes.bind("z", z, "B S H P", (x.dtype,), optional=True)
    sizes.bind("dt_bias", dt_bias, "H", FLOATS, optional=True)
    one_of("mamba2_scan", "dt_softplus", dt_softplus, (False, True))
    rows = sizes.packed(cu_seqlens)
    sizes.bind("initial_state", initial_state, f"{rows} H P N", FLOATS, optional=True)
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    arguments |= {"dt_softplus": dt_softplus, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return select(Problem.of("mamba2_scan", **arguments), kernel).run(**arguments)
