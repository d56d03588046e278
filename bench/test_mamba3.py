"""Mamba-3's scan beside mamba-ssm: the recipe's shape, MIMO of rank 4 and SISO; lengths; 112 heads; packed; then ours alone.

x, z, B, C are contiguous, dt and log_decay are views [B, H, S] of [B, S, H] in fp32, trap and the shared angles come in
x's dtype and the parameters in fp32: what mamba-ssm's own layer hands its kernels, so that neither side copies more than
there. The final state is not asked for.

mamba-ssm's SISO tunes once for all lengths (272 s on an H200), again for another number of heads (half a minute even where
all is compiled) and for packed sequences. Its MIMO compiles for every shape (146 s), and another time for packed
sequences. So the two recipe shapes come first, packed sequences last, and other ranks, dtypes, N and P are measured alone.
`-k S4096` leaves out the other lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench.measure import errors
from bench.record import keep_errors
from nam56r.kernels.mamba3 import mamba3_scan
from nam56r.kernels.registry import Device, NoKernel, Problem, select

PEER = "peer:mamba-ssm"
WORDS = {torch.bfloat16: None, torch.float16: "fp16"}
ROWS = 64  # of a chunk's score matrix, tokens × rank: what a tensor core's tile holds


@dataclass(frozen=True)
class Case:
    """rank: of MIMO; None is SISO. sequences: how many of equal length are packed into S."""

    rank: int | None
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
    def form(self) -> str:
        return f"rank{self.rank}" if self.rank else "siso"

    @property
    def name(self) -> str:
        words = (
            f"{self.form} B{self.B} S{self.S} H{self.H} P{self.P} G{self.G} N{self.N}",
            WORDS[self.dtype],
            self.sequences > 1 and f"packed{self.sequences}",
        )
        return " ".join(filter(None, words))

    def inputs(self, device: str = "cuda") -> dict[str, torch.Tensor | None]:
        """`scan`'s arguments as the layer makes them at its start: B and C normed, dt around a log-uniform [1e-3, 0.1].

        The parameters are within a tenth of their initial values, so that none is like another.
        """
        torch.manual_seed(0)
        B, S, H, P, G, N, R = self.B, self.S, self.H, self.P, self.G, self.N, self.rank or 1

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        def near(value: float, *shape: int) -> torch.Tensor:
            return value * (1 + 0.1 * draw(*shape))

        start = torch.empty(H, device=device).uniform_(math.log(1e-3), math.log(0.1)).exp()
        dt_bias = start + torch.log(-torch.expm1(-start))  # softplus⁻¹
        dt, raw = F.softplus(draw(B, S, H) + dt_bias), draw(B, S, H)
        log_decay = -torch.where(raw >= 0, 1 + raw, 1 / (1 - raw.clamp(max=0))).clamp(min=1e-4) * dt
        tokens = {
            "x": draw(B, S, H, P),
            "B": F.rms_norm(draw(B, S, R, G, N), (N,)),
            "C": F.rms_norm(draw(B, S, R, G, N), (N,)),
            "trap": draw(B, S, H).transpose(1, 2),
            "angles": draw(B, S, 1, N // 4),
            "z": draw(B, S, H, P),
        }
        leaves = {name: t.to(self.dtype) for name, t in tokens.items()}
        leaves |= {"dt": dt.transpose(1, 2), "log_decay": log_decay.transpose(1, 2)}
        leaves |= {"B_bias": near(1, H, R, N), "C_bias": near(1, H, R, N), "D": near(1, H)}
        if self.rank:
            leaves |= {"psi": near(1 / R, H, R, P), "zeta": near(1, H, R, P), "phi": near(1 / R, H, R, P)}
        bounds = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * (S // self.sequences)
        return {
            **{name: t.requires_grad_() for name, t in leaves.items()},
            "cu_seqlens": bounds if self.sequences > 1 else None,
        }

    def flops(self) -> dict[str, float]:
        """Forward, in chunks of 64 rows (tokens × rank): C Bᵀ, scores v, C S and vᵀ B; backward twice that.

        With N 128 and P 64 that is 3.7 MFLOP for a head and 16 tokens of rank 4 or 64 tokens of SISO: at the recipe's
        shape 0.24 and 0.06 TFLOP forward. The floor is the larger time of that and of the bytes, at the datasheet's rates:
        on an H200 0.24 and 0.73 ms for rank 4 (0.30 and 0.91 ms at the 792 TFLOP/s that it gives a large product), and
        0.09 and 0.26 ms for SISO, by its bytes. Bias and rotation are a head's own, so C Bᵀ is counted for every head;
        what a backward computes or reads again isn't counted.
        """
        blocks = self.B * self.S * self.H * (self.rank or 1) / ROWS
        forward = blocks * (2 * ROWS**2 * (self.N + self.P) + 4 * ROWS * self.N * self.P)
        return {"fwd": forward, "fwd+bwd": 3 * forward}


MIMO, SISO = Case(4, 2, 4096), Case(None, 2, 4096)
LENGTHS = ((2, 1024), (2, 2048), (2, 8192), (2, 16384), (1, 32768), (1, 65536))
CASES = (
    MIMO,
    SISO,
    *(Case(rank, 2, 4096, dtype=torch.float16, peers=()) for rank in (4, None)),
    *(Case(rank, 2, 4096, peers=()) for rank in (1, 2, 8)),
    *(Case(rank, 2, 4096, N=N, peers=()) for rank in (4, None) for N in (64, 256)),
    *(Case(rank, 2, 4096, P=P, peers=()) for rank in (4, None) for P in (32, 128)),
    *(Case(None, B, S) for B, S in LENGTHS),
    Case(None, 2, 4096, H=112),
    Case(4, 2, 4096, H=112),
    *(Case(4, B, S) for B, S in LENGTHS),
    Case(None, 1, 8192, sequences=8),
    Case(4, 1, 8192, sequences=8),
)


def scan(kernel: str, psi=None, zeta=None, phi=None, **inputs: torch.Tensor | None) -> torch.Tensor:
    """The operator's y, its three MIMO parameters given one by one."""
    return mamba3_scan(**inputs, mimo=None if psi is None else (psi, zeta, phi), kernel=kernel)[0]


def moved(inputs: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """Forward: the inputs in, y out; backward: the inputs and dy in, their gradients out."""
    read, y = sum(t.nbytes for t in inputs.values() if t is not None and t.requires_grad), inputs["x"].nbytes
    return {"fwd": read + y, "fwd+bwd": 3 * read + 2 * y}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mamba3(measure, case):
    inputs = case.inputs()
    measure(
        "mamba3_scan",
        case.name,
        "cuda",
        lambda kernel: scan(kernel, **inputs),
        grad=[t for t in inputs.values() if t is not None and t.requires_grad],
        flops=case.flops(),
        moved=moved(inputs),
        peers=case.peers,
    )


@pytest.mark.parametrize("case", (MIMO, SISO), ids=lambda case: case.form)
def test_error(pytestconfig, case):
    """Against the float64 definition, ours errs no more than mamba-ssm in y and in every gradient."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: only errors measured on a GPU are recorded")
    inputs = case.inputs()
    asked = {"psi": None, "zeta": None, "phi": None, "initial_state": None} | inputs
    try:
        select(Problem.of("mamba3_scan", **asked), PEER)
    except NoKernel as refusal:
        pytest.skip(f"no errors to compare with: {refusal}")
    found = errors(scan, inputs, torch.randn_like(inputs["x"]), ("cuda", PEER))
    device = Device.of("cuda").name
    keep_errors(pytestconfig.getoption("--results"), f"mamba3_scan {case.form}", case.name, device, found)
    worse = {name: pair for name, pair in found.items() if not pair["cuda"] <= pair[PEER]}
    assert not worse, f"further from float64 than mamba-ssm: {worse}"
