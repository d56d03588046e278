"""Expanded MLA at the recipes' geometry, whole rows and packed, and at DeepSeek's. No peer: cuDNN is the library's."""

import pytest
import torch

from nam56r.kernels.mla import mla_attention


@pytest.mark.parametrize(
    "B, S, H, Dn, Dr, Dv, sequences",
    [
        (2, 4096, 32, 64, 64, 64, 1),
        (1, 4096, 28, 64, 64, 64, 1),
        (1, 16384, 32, 64, 64, 64, 1),
        (1, 8192, 32, 64, 64, 64, 8),
        (1, 4096, 128, 128, 64, 128, 1),
    ],
)
def test_mla_attention(measure, B, S, H, Dn, Dr, Dv, sequences):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    inputs = draw(B, S, H, Dn + Dr), draw(B, S, H, Dn), draw(B, S, Dr), draw(B, S, H, Dv)
    packed = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * (S // sequences) if sequences > 1 else None

    def run(kernel):
        return mla_attention(*inputs, scale=(Dn + Dr) ** -0.5, cu_seqlens=packed, kernel=kernel)

    length = S // sequences
    scores = B * H * sequences * length * (length + 1) / 2
    forward = 2 * scores * (Dn + Dr + Dv)
    flops = {"fwd": forward, "fwd+bwd": 3 * forward}  # without the scores that the backward computes again
    read = sum(t.nbytes for t in inputs)
    out = inputs[3].nbytes
    moved = {"fwd": read + out, "fwd+bwd": 3 * read + 3 * out}  # both passes read; the backward writes gradients
    case = f"B{B} S{S} H{H} {Dn + Dr}/{Dv}" + (f" packed{sequences}" if packed is not None else "")
    measure("mla_attention", case, "torch", run, grad=inputs, flops=flops, moved=moved)
