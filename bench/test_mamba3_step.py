"""Mamba-3's step for decoding: 1, 32 and 256 sequences at the recipe's shape, MIMO of rank 4 and SISO, in place.

The case's S is 1 and its B the number of sequences. The floor is the bytes moved at the datasheet's rate: 8 P N a head
and sequence for its state, 8 MiB a sequence here. The L2 cache would hold that of one; the timer flushes it before each
run, as the other layers would. mamba-ssm's steps are not measured: its SISO step is a Triton kernel, its MIMO step CuTe
behind a Triton kernel for the rotation, and its states are laid out in another way.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.measure import on_the_host
from nam56r.kernels.mamba3 import Mamba3State, mamba3_step
from nam56r.kernels.testing import flatten

H, P, G, N = 128, 64, 8, 128


def inputs(n: int, rank: int | None, H: int = H, P: int = P, G: int = G, N: int = N) -> dict:
    """bf16 tokens, fp32 dt, log_decay and parameters, angles shared over heads: as the layer hands them over."""
    torch.manual_seed(0)
    R = rank or 1

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    low, dt = torch.bfloat16, F.softplus(draw(n, H) - 4)
    return {
        **{name: draw(n, H, P, dtype=low) for name in ("x", "z")},
        **{name: draw(n, R, G, N, dtype=low) for name in ("B", "C")},
        "dt": dt,
        "log_decay": -dt,
        "trap": draw(n, H, dtype=low),
        "angles": draw(n, 1, N // 4, dtype=low),
        **{name: draw(H, R, N) for name in ("B_bias", "C_bias")},
        "D": draw(H),
        "mimo": tuple(draw(H, R, P) for _ in range(3)) if rank else None,
        "state": Mamba3State(draw(n, H, P, N), draw(n, H, R, N), draw(n, H, R, P), draw(n, H, N // 4)),
    }


def name_of(n: int, rank: int | None) -> str:
    return f"{f'rank{rank}' if rank else 'siso'} B{n} S1 H{H} P{P} G{G} N{N}"


@pytest.mark.parametrize("rank", [4, None], ids=["rank4", "siso"])
@pytest.mark.parametrize("n", [1, 32, 256])
def test_mamba3_step(measure, n, rank):
    made = inputs(n, rank)
    # all that is read, the state written, and y
    moved = sum(t.nbytes for t in (*flatten(list(made.values())), *made["state"], made["x"]))
    measure(
        "mamba3_step",
        name_of(n, rank),
        "triton",
        lambda kernel: mamba3_step(**made, out=made["state"], kernel=kernel)[0],
        moved={"fwd": moved},
    )


@pytest.mark.parametrize("rank", [4, None], ids=["rank4", "siso"])
def test_on_the_host(measure, rank):
    """Checks, selection, dispatch and launch of an eager call, which a graph leaves out."""
    made = inputs(1, rank, H=8, P=16, G=1, N=16)
    measure(
        "mamba3_step",
        f"host {'rank4' if rank else 'siso'} B1 S1 H8 P16 G1 N16",
        "triton",
        lambda kernel: mamba3_step(**made, out=made["state"], kernel=kernel)[0],
        timer=on_the_host,
    )
