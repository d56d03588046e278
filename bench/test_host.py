"""What an eager call costs on the host: checks, selection, dispatch, autograd, launches. Tiny problems, device waiting."""

import torch

from bench.measure import on_the_host
from nam56r.kernels.conv1d import causal_conv1d
from nam56r.kernels.norm import rms_norm


def draw(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)


def test_causal_conv1d(measure):
    x, weight = draw(1, 16, 64), draw(64, 4)
    measure(
        "causal_conv1d",
        "host B1 S16 C64 W4",
        "cuda",
        lambda kernel: causal_conv1d(x, weight, activation="silu", kernel=kernel)[0],
        grad=(x, weight),
        timer=on_the_host,
    )


def test_rms_norm(measure):
    x, weight = draw(16, 64), draw(64)
    measure(
        "rms_norm",
        "host 16x64",
        "torch",
        lambda kernel: rms_norm(x, weight, 1e-5, kernel=kernel),
        grad=(x, weight),
        timer=on_the_host,
    )
