"""M²RNN beside XMA: the recipes' shapes, lengths, head counts; then ours alone in other dtypes and head sizes.

q and k have one head, as in the recipes. weight and forget come in q's dtype, which is what XMA wants and ours takes as
well: neither casts. Only the case named fp32forget has them in fp32, as the layer does, and there XMA's user pays for
two casts. XMA's cases are all of one (K, V), for which it tunes once (bench/peers/xma.py); one head and packed sequences
make it tune again, so they come last. About three minutes on an H200 with XMA, two of them XMA's tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench.measure import errors
from bench.record import keep_errors
from nam56r.kernels.m2rnn import m2rnn
from nam56r.kernels.registry import Device, NoKernel, Problem, select

# Nanoseconds that a step can't go below: on an H200 at 1.98 GHz its chain of two mma.m16n8k16, tanh, blend and conversion
# takes 159 cycles with nothing else in the loop. With the backward's chain behind it 4096 steps take 0.8 ms.
FLOOR_NS = {"fwd": 159 / 1.98, "fwd+bwd": 0.8e6 / 4096}
WORDS = {torch.bfloat16: None, torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """sequences: how many of equal length are packed into S; gates: the dtype of weight and forget (None: q's)."""

    B: int
    S: int
    N: int
    K: int = 64
    V: int = 16
    dtype: torch.dtype = torch.bfloat16
    gates: torch.dtype | None = None
    sequences: int = 1
    peers: tuple[str, ...] = ("peer:xma",)

    @property
    def name(self) -> str:
        words = (
            f"B{self.B} S{self.S} N{self.N} K{self.K} V{self.V}",
            WORDS[self.dtype],
            self.gates and f"{WORDS[self.gates]}forget",
            self.sequences > 1 and f"packed{self.sequences}",
        )
        return " ".join(filter(None, words))

    def inputs(self, device: str = "cuda") -> dict[str, torch.Tensor | None]:
        """The operator's arguments: q, k, v as SiLU leaves them, W near the identity, the layer's gates at its start."""
        torch.manual_seed(0)
        B, S, N, K, V = self.B, self.S, self.N, self.K, self.V

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.empty(N, device=device).uniform_(low, high)

        dt = uniform(math.log(1e-3), math.log(0.1)).exp()
        dt_bias = dt + torch.log(-torch.expm1(-dt))  # softplus⁻¹
        gates = {
            "weight": torch.eye(V, device=device) + 0.05 * draw(N, V, V),
            "forget": torch.exp(-uniform(0, 16) * F.softplus(draw(B, S, N) + dt_bias)),
        }
        shapes = {"q": (B, S, 1, K), "k": (B, S, 1, K), "v": (B, S, N, V)}
        leaves = {name: F.silu(draw(*shape)).to(self.dtype) for name, shape in shapes.items()}
        leaves |= {name: t.to(self.gates or self.dtype) for name, t in gates.items()}
        bounds = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * (S // self.sequences)
        return {
            **{name: t.requires_grad_() for name, t in leaves.items()},
            "cu_seqlens": bounds if self.sequences > 1 else None,
        }

    def flops(self) -> dict[str, float]:
        """Forward: H W, k vᵀ and Hᵀ q; backward twice that. What a backward computes again isn't counted."""
        forward = self.B * self.S * self.N * self.K * (2 * self.V**2 + 4 * self.V)
        return {"fwd": forward, "fwd+bwd": 3 * forward}

    def floor_ms(self, device: str) -> dict[str, float]:
        """By latency, where it was measured: 16-bit operands, V 16, an H200."""
        if device != "h200" or self.V != 16 or self.dtype == torch.float32:
            return {}
        return {passed: ns * 1e-6 * self.S / self.sequences for passed, ns in FLOOR_NS.items()}


RECIPE = Case(2, 4096, 51)
CASES = (
    RECIPE,
    Case(2, 4096, 8),
    Case(4, 4096, 44),
    *(Case(2, S, 51) for S in (1024, 2048, 8192, 16384, 32768)),
    *(Case(2, 4096, N) for N in (2, 4, 16, 32, 64, 128)),
    Case(2, 4096, 51, gates=torch.float32),
    Case(2, 4096, 1),
    Case(1, 8192, 51, sequences=8),
    *(Case(2, 4096, 51, dtype=dtype, peers=()) for dtype in (torch.float16, torch.float32)),
    *(Case(2, 4096, 51, V=V, peers=()) for V in (32, 64)),
    *(Case(2, 4096, 51, K=K, peers=()) for K in (16, 128)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_m2rnn(measure, case):
    inputs = case.inputs()
    grad = [t for t in inputs.values() if t is not None and t.requires_grad]
    # forward: the inputs in, y out; backward: the inputs and dy in, their gradients out
    read, y = sum(t.nbytes for t in grad), inputs["v"].nbytes
    measure(
        "m2rnn",
        case.name,
        "cuda",
        lambda kernel: m2rnn(**inputs, kernel=kernel)[0],
        grad=grad,
        flops=case.flops(),
        moved={"fwd": read + y, "fwd+bwd": 3 * read + 2 * y},
        floor_ms=case.floor_ms(Device.of("cuda").name),
        peers=case.peers,
    )


def test_error(pytestconfig):
    """Against the float64 definition, ours errs no more than XMA in y and in every gradient."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: only errors measured on a GPU are recorded")
    inputs = RECIPE.inputs()
    try:
        select(Problem.of("m2rnn", **inputs), "peer:xma")
    except NoKernel as refusal:
        pytest.skip(f"no errors to compare with: {refusal}")

    def run(kernel, **inputs):
        return m2rnn(**inputs, kernel=kernel)[0]

    found = errors(run, inputs, torch.randn_like(inputs["v"]), ("cuda", "peer:xma"))
    keep_errors(pytestconfig.getoption("--results"), "m2rnn", RECIPE.name, Device.of("cuda").name, found)
    worse = {name: pair for name, pair in found.items() if not pair["cuda"] <= pair["peer:xma"]}
    assert not worse, f"further from float64 than XMA: {worse}"
