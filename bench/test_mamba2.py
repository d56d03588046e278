"""Mamba-2's scan beside mamba-ssm: the recipe's shape; lengths; 112 heads; packed; then ours alone in other dtypes and sizes.

The inputs are what stock Megatron's mixer hands the scan: x, B, C after SiLU, dt before bias and softplus, all in x's dtype;
A, D and dt_bias in fp32; no z, which its norm takes. The final state is not asked for. mamba-ssm tunes at its first calls
(73 s on an H200), a few of its kernels again for another number of heads or of chunks (8 s each), and all of them for
another N or P, so those are measured alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench.measure import errors
from bench.record import keep_errors
from nam56r.kernels.mamba2 import mamba2_scan
from nam56r.kernels.mamba2.reference import mamba2_scan as definition
from nam56r.kernels.registry import Device, NoKernel, Problem, select

PEER, PLAIN = "peer:mamba-ssm", "PyTorch"
WORDS = {torch.bfloat16: None, torch.float16: "fp16"}
CHUNK = 64


@dataclass(frozen=True)
class Case:
    """sequences: how many of equal length are packed into S."""

    B: int
    S: int
    H: int = 128
    P: int = 64
    G: int = 8
    N: int = 128
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 1
    peers: tuple[str, ...] = (PEER,)

    @property
    def name(self) -> str:
        words = (
            f"B{self.B} S{self.S} H{self.H} P{self.P} G{self.G} N{self.N}",
            WORDS[self.dtype],
            self.sequences > 1 and f"packed{self.sequences}",
        )
        return " ".join(filter(None, words))

    def inputs(self, device: str = "cuda") -> dict[str, torch.Tensor | None]:
        """The operator's arguments at a layer's start: A in (1, 16), dt around a log-uniform [1e-3, 0.1], D about 1."""
        torch.manual_seed(0)
        B, S, H, P, G, N = self.B, self.S, self.H, self.P, self.G, self.N

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.empty(H, device=device).uniform_(low, high)

        dt = uniform(math.log(1e-3), math.log(0.1)).exp()
        tokens = {"x": F.silu(draw(B, S, H, P)), "dt": draw(B, S, H)}
        tokens |= {"B": F.silu(draw(B, S, G, N)), "C": F.silu(draw(B, S, G, N))}
        leaves = {name: t.to(self.dtype) for name, t in tokens.items()}
        leaves |= {"A": -uniform(1, 16), "D": 1 + 0.1 * draw(H), "dt_bias": dt + torch.log(-torch.expm1(-dt))}
        bounds = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * (S // self.sequences)
        return {
            **{name: t.requires_grad_() for name, t in leaves.items()},
            "cu_seqlens": bounds if self.sequences > 1 else None,
        }

    def flops(self) -> dict[str, float]:
        """Forward, in chunks of 64 tokens: C Bᵀ once a group, scores x, C S and xᵀ B by head; backward twice that.

        0.04 TFLOP forward at the recipe's shape, so the bytes are the floor: 0.06 and 0.16 ms by an H200's datasheet. What a
        backward computes or reads again, and the states between chunks, aren't counted.
        """
        rows, chunks = self.B * self.S, self.B * self.S / CHUNK
        products = 2 * CHUNK**2 * (self.G * self.N + self.H * self.P)
        forward = chunks * products + rows * self.H * 4 * self.N * self.P
        return {"fwd": forward, "fwd+bwd": 3 * forward}


RECIPE = Case(2, 4096)
CASES = (
    RECIPE,
    *(Case(B, S) for B, S in ((2, 1024), (2, 2048), (2, 8192), (2, 16384), (1, 32768), (1, 65536))),
    Case(2, 4096, H=112),
    Case(1, 8192, sequences=8),
    Case(2, 4096, dtype=torch.float16, peers=()),
    *(Case(2, 4096, N=N, peers=()) for N in (64, 256)),
    *(Case(2, 4096, P=P, peers=()) for P in (32, 128)),
)


def scan(kernel: str, **inputs: torch.Tensor | None) -> torch.Tensor:
    if kernel == PLAIN:
        return definition(**inputs, dt_softplus=True, compute_dtype=inputs["x"].dtype)[0]
    return mamba2_scan(**inputs, dt_softplus=True, kernel=kernel)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mamba2(measure, case):
    inputs = case.inputs()
    grad = [t for t in inputs.values() if t is not None and t.requires_grad]
    # forward: the inputs in, y out; backward: the inputs and dy in, their gradients out
    read, y = sum(t.nbytes for t in grad), inputs["x"].nbytes
    measure(
        "mamba2_scan",
        case.name,
        "cuda",
        lambda kernel: scan(kernel, **inputs),
        grad=grad,
        flops=case.flops(),
        moved={"fwd": read + y, "fwd+bwd": 3 * read + 2 * y},
        peers=case.peers,
    )


def test_error(pytestconfig):
    """Ours errs at most twice what plain PyTorch in x's dtype does, in y and in every gradient; mamba-ssm's is kept beside."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: only errors measured on a GPU are recorded")
    inputs = RECIPE.inputs()
    try:
        select(Problem.of("mamba2_scan", initial_state=None, **inputs), PEER)
    except NoKernel as refusal:
        pytest.skip(f"no errors to compare with: {refusal}")
    found = errors(scan, inputs, torch.randn_like(inputs["x"]), ("cuda", PEER, PLAIN))
    keep_errors(pytestconfig.getoption("--results"), "mamba2_scan", RECIPE.name, Device.of("cuda").name, found)
    worse = {name: by_kernel for name, by_kernel in found.items() if not by_kernel["cuda"] <= 2 * by_kernel[PLAIN]}
    assert not worse, f"more than twice as far from float64 as PyTorch in {inputs['x'].dtype}: {worse}"
