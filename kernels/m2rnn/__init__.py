"""M²RNN: a recurrent net with a matrix for a state (arXiv 2603.14360)."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes
from nam56r.kernels.m2rnn import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def m2rnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    forget: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """H_t = f_t H_{t-1} + (1 − f_t) tanh(H_{t-1} W + k_t v_tᵀ),  y_t = H_tᵀ q_t, per batch row and head.

    q              [B, S, Hq, K]  bf16, fp16, fp32 or fp64; head h reads q's head h // (H / Hq)
    k              [B, S, Hk, K]  q's dtype; shared in the same way
    v              [B, S, H, V]   q's dtype
    weight         [H, V, V]      W, any of these dtypes
    forget         [B, S, H]      f in (0, 1), any of these dtypes
    initial_state  [n, H, K, V]   H_0, any of these dtypes; zero if None. n is B, or the sequences packed
    cu_seqlens     [n + 1]        int32, the packed sequences' bounds in S (B is 1); empty ones are allowed
    kernel         a name from the registry; None takes the first that accepts the problem

    Returns y [B, S, H, V] in q's dtype and the final state [n, H, K, V] in fp32 (fp64 for fp64 inputs), which is
    what the state is kept in. Gradients flow through both and through initial_state.
    The kernel `cuda` takes bf16, fp16 and fp32, K up to 128 and V of 16, 32 or 64, on compute capability 8.0 and later; in
    bf16 and fp16 it rounds W to fp16, so that |W| must stay below 65504.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    sizes = Shapes("m2rnn")
    sizes.bind("q", q, "B S Hq K", FLOATS)
    sizes.bind("k", k, "B S Hk K", (q.dtype,))
    sizes.bind("v", v, "B S H V", (q.dtype,))
    sizes.bind("weight", weight, "H V V", FLOATS)
    sizes.bind("forget", forget, "B S H", FLOATS)
    sizes.divides("Hq", "H")
    sizes.divides("Hk", "H")
    rows = sizes.packed(cu_seqlens)
    sizes.bind("initial_state", initial_state, f"{rows} H K V", FLOATS, optional=True)
    arguments = {"q": q, "k": k, "v": v, "weight": weight, "forget": forget}
    arguments |= {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return select(Problem.of("m2rnn", **arguments), kernel).run(**arguments)
