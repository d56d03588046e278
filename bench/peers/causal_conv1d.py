"""causal-conv1d (github.com/Dao-AILab/causal-conv1d), channels last as ours."""

from __future__ import annotations

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel, Problem


def causal_conv1d(x, weight, bias, activation, initial_state, cu_seqlens):
    from causal_conv1d import causal_conv1d_fn

    state = None if initial_state is None else initial_state.mT
    y, final_state = causal_conv1d_fn(
        x.mT, weight, bias, initial_states=state, return_final_states=True, activation=activation
    )
    return y.mT, final_state.mT


def _refuses(problem: Problem) -> tuple[str, ...]:
    packed = () if problem["cu_seqlens"] is None else ("gives no final states of packed sequences",)
    return (*not_installed("causal_conv1d")(problem), *packed)


KERNELS = (Kernel("causal_conv1d", "peer:causal-conv1d", causal_conv1d, _refuses, role="peer"),)
