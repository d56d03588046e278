"""Causal depthwise convolution over time with bias and SiLU, as before the scans of Mamba (arXiv 2312.00752) and M²RNN."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.conv1d import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = act(bias + Σ_w weight[:, w] · x_{t-W+1+w}), every channel by itself.

    x              [B, S, C]     bf16, fp16, fp32 or fp64. A slice of a wider projection (last stride 1) is read in
                                 place; the `cuda` kernel copies an x of any other last stride first
    weight         [C, W]        the dtype of x, or fp32; W is 2, 3 or 4; weight[:, W-1] meets the newest input
    bias           [C]           the dtype of x, or fp32
    activation     None or "silu"
    initial_state  [n, W-1, C]   the dtype of x; the last W-1 inputs before each sequence, oldest first; None is zeros
    cu_seqlens     [n + 1]       int32, n sequences packed into one row (B = 1), which don't see each other; without it
                                 n = B. On a CPU its values are checked; on CUDA wrong ones give wrong numbers
    kernel         a name from the registry; None takes the first that accepts the problem

    Returns (y [B, S, C], final_state [n, W-1, C]) in the dtype of x: final_state is the last W-1 inputs of each
    sequence, which reach into its initial state where it is shorter. Sums are fp32 (fp64 for fp64 inputs).
    Gradients to x, weight, bias and initial_state, through both results.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel, listing
    each candidate's reasons, when none can run it.
    """
    sizes = Shapes("causal_conv1d")
    sizes.bind("x", x, "B S C", FLOATS)
    either = tuple(dict.fromkeys((x.dtype, torch.float32)))
    sizes.bind("weight", weight, "C W", either)
    if not 2 <= sizes["W"] <= 4:
        raise ValueError(f"causal_conv1d: weight is {list(weight.shape)}, but its width must be 2, 3 or 4")
    sizes.bind("bias", bias, "C", either, optional=True)
    one_of("causal_conv1d", "activation", activation, (None, "silu"))
    sequences = sizes.packed(cu_seqlens)
    sizes.bind("initial_state", initial_state, f"{sequences} {sizes['W'] - 1} C", (x.dtype,), optional=True)
    problem = Problem.of(
        "causal_conv1d",
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return select(problem, kernel).run(x, weight, bias, activation, initial_state, cu_seqlens)
