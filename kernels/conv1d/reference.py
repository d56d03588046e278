"""The causal depthwise convolution by its definition: a sum of shifted inputs."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nam56r.kernels.conv1d.causal_conv1d`. Packed sequences run one after the other, cut on the host.

    compute_dtype: of the sums and the activation; None is fp32, or fp64 for fp64 inputs.
    """
    batches, length, channels = x.shape
    width = weight.shape[1]
    if cu_seqlens is not None:
        results = [
            causal_conv1d(
                x[:, begin:end],
                weight,
                bias,
                activation,
                None if initial_state is None else initial_state[i : i + 1],
                compute_dtype=compute_dtype,
            )
            for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        ys, states = zip(*results) if results else ((), ())
        return torch.cat((x[:, :0], *ys), 1), torch.cat((x.new_empty(0, width - 1, channels), *states))

    compute = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(batches, width - 1, channels)
    inputs = torch.cat((initial_state, x), 1)
    y = sum(inputs[:, w : w + length].to(compute) * weight[:, w].to(compute) for w in range(width))
    if bias is not None:
        y = y + bias.to(compute)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, length:].contiguous()
