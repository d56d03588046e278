"""XMA (github.com/open-lm-engine/accelerated-model-architectures): its M²RNN in Triton.

XMA wants one dtype for everything and carries the state in it, so forget, weight and initial_state are cast to q's dtype
here, where they aren't in it yet; its final state comes in q's dtype too. It needs torch, triton and numpy. For every
(K, V), and again where an argument's dtype or presence changes, it times 24 configurations for each of three kernels at
the first shape it meets (40 s on an H200) and keeps the fastest for all later shapes.
"""

from __future__ import annotations

import math
import os

import torch

from bench.peers import not_installed
from nam56r.kernels.registry import Kernel, Problem


def m2rnn(q, k, v, weight, forget, initial_state, cu_seqlens):
    # XMA asks JAX, where it is installed, whether this is a TPU; JAX would answer after taking most of the GPU's memory
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from xma.layers.m2rnn import m2rnn

    weight, forget = weight.to(q.dtype), forget.to(q.dtype)
    state = None if initial_state is None else initial_state.to(q.dtype)
    if cu_seqlens is None:
        return m2rnn(q, k, v, weight, forget, state)
    # max_seqlen has to be given and is not used
    tokens = (t[0] for t in (q, k, v))
    y, final = m2rnn(*tokens, weight, forget[0], state, cu_seqlens=cu_seqlens, max_seqlen=q.shape[1])
    return y[None], final


def _refuses(problem: Problem) -> tuple[str, ...]:
    (B, S, H, V), dtype = problem["v"].shape, problem["v"].dtype
    states = math.prod((B, S, H, problem["q"].shape[-1], V))
    return (
        *not_installed("xma")(problem),
        *(("its Triton kernels don't compile for fp64",) if dtype == torch.float64 else ()),
        *((f"its 32-bit offsets don't reach all of the {states:,} elements of its states",) if states > 2**32 else ()),
    )


KERNELS = (Kernel("m2rnn", "peer:xma", m2rnn, _refuses, role="peer"),)
