"""RMSNorm at the recipe's width, with and without the residual add. It is bound by memory."""

import pytest
import torch

from nam56r.kernels.norm import rms_norm


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(measure, residual):
    rows, width = 8192, 4096

    def draw(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    x, weight = draw(rows, width), draw(width)
    added = draw(rows, width) if residual else None

    def run(kernel):
        return rms_norm(x, weight, 1e-5, residual=added, kernel=kernel)

    # forward: x in, y out (and residual in, s out); backward: s and dy in, dx out (and ds in)
    tensors = {"fwd": 4, "fwd+bwd": 8} if residual else {"fwd": 2, "fwd+bwd": 5}
    moved = {name: count * x.nbytes for name, count in tensors.items()}
    measure(
        "rms_norm",
        f"{rows}x{width}" + (" residual" if residual else ""),
        "torch",
        run,
        grad=[x, weight, *([added] if residual else [])],
        moved=moved,
        peers=("peer:pytorch", "peer:liger"),
    )
