"""The causal convolution before a scan: the R block's width, Mamba's, packed, read out of a wider projection."""

import pytest
import torch

from nam56r.kernels.conv1d import causal_conv1d


@pytest.mark.parametrize(
    "B, S, C, projection, activation, sequences",
    [
        (2, 4096, 944, 944, None, 1),
        (2, 4096, 944, 1856, "silu", 1),
        (2, 4096, 8192, 8192, "silu", 1),
        (1, 8192, 944, 944, "silu", 8),
    ],
)
def test_causal_conv1d(measure, B, S, C, projection, activation, sequences):
    width = 4

    def draw(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    x = draw(B, S, projection)[..., :C].requires_grad_()
    weight, bias = draw(C, width).requires_grad_(), draw(C).requires_grad_()
    packed = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * (S // sequences) if sequences > 1 else None

    def run(kernel):
        return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=packed, kernel=kernel)[0]

    # forward: x in, y out; backward: x and dy in, dx out
    tensor = B * S * C * x.element_size()
    moved = {"fwd": 2 * tensor, "fwd+bwd": 5 * tensor}
    words = [
        f"B{B} S{S} C{C} W{width}",
        activation,
        projection > C and f"of{projection}",
        packed is not None and f"packed{sequences}",
    ]
    measure(
        "causal_conv1d",
        " ".join(filter(None, words)),
        "cuda",
        run,
        grad=[x, weight, bias],
        moved=moved,
        peers=("peer:pytorch", "peer:causal-conv1d"),
    )
