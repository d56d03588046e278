"""MLA, absorbed and expanded, causal, beside cuDNN through PyTorch: attention alone, and with the RoPE before it.

The absorbed form at 128/64 has the expanded form's scores and FLOPs. Its peers are cuDNN on keys and values written out
for every head and, named -mqa, on one head that all share. The expanded form's peer gets its keys concatenated. All
that is made beforehand. In the cases named rope it is timed too, from q and keys that RoPE hasn't turned: ours by
`mla_queries` and `mla_latents`, the peers as Megatron does it without Transformer Engine and, named -compiled, the same
compiled by Inductor. cos and sin are made beforehand for everyone, in fp32 for ours and in bf16 for the peers.

Packed sequences, which cuDNN doesn't take through PyTorch, go to its FlashAttention-2 (peer:varlen), with v padded to
q's width and the longest length known. "torch" is the project's second kernel, which concatenates the keys itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch

from bench.measure import errors
from bench.peers.cudnn import packed, padded, prepared, whole, written_out
from bench.record import keep_errors
from nam56r.kernels.mla import latent_attention, mla_attention, reference
from nam56r.kernels.mla.rope import mla_latents, mla_queries, positions_of, rope_tables
from nam56r.kernels.registry import Device

PEER, PACKED_PEER, PLAIN = "peer:cudnn", "peer:varlen", "PyTorch"
OPERATORS = {"latent_attention": latent_attention, "mla_attention": mla_attention}
THETA = 500_000.0  # the recipe's


@dataclass(frozen=True)
class Case:
    """Dn is the latent's width in the absorbed form; lengths are those of the sequences packed into S."""

    op: str
    B: int
    S: int
    H: int = 32
    Dn: int = 64
    Dr: int = 64
    Dv: int = 64
    lengths: tuple[int, ...] = ()
    rope: bool = False

    @property
    def absorbed(self) -> bool:
        return self.op == "latent_attention"

    @property
    def kernel(self) -> str:
        """Ours: in CUDA at the dims that it takes; a latent of 512 in Triton, beside nothing, as no peer takes its dims."""
        return "triton" if self.absorbed and self.Dn > 64 else "cuda"

    @property
    def name(self) -> str:
        packing = "packed" if len(set(self.lengths)) == 1 else "ragged"
        words = (
            f"B{self.B} S{self.S} H{self.H} {self.Dn + self.Dr}/{self.Dv}",
            self.lengths and f"{packing}{len(self.lengths)}",
            self.rope and "rope",
        )
        return " ".join(filter(None, words))

    @property
    def peers(self) -> tuple[str, ...]:
        if self.kernel == "triton":
            return ()
        peer = PACKED_PEER if self.lengths else PEER
        if self.rope:
            return (peer, f"{peer}-compiled", *((f"{peer}-mqa-compiled",) if self.absorbed else ()))
        return peer, f"{peer}-mqa" if self.absorbed else "torch"

    def inputs(self, device: str = "cuda") -> dict[str, torch.Tensor]:
        """The operator's tensors, not yet turned in a rope case."""
        torch.manual_seed(0)
        B, S, H, Dn, Dr, Dv = self.B, self.S, self.H, self.Dn, self.Dr, self.Dv
        expanded = {"k_nope": (B, S, H, Dn), "k_rope": (B, S, Dr), "v": (B, S, H, Dv)}
        shapes = {"q": (B, S, H, Dn + Dr), **({"kv": (B, S, Dn + Dr)} if self.absorbed else expanded)}
        drawn = {name: torch.randn(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
        return {name: t.requires_grad_() for name, t in drawn.items()}

    def options(self, device: torch.device | str = "cuda") -> dict[str, Any]:
        """The operator's other arguments."""
        bounds = [0, *accumulate(self.lengths)]
        return {
            **({"value_dim": self.Dv} if self.absorbed else {}),
            "scale": (self.Dn + self.Dr) ** -0.5,
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=device) if self.lengths else None,
        }

    def written_out(self, inputs: dict[str, torch.Tensor], heads: int) -> list[torch.Tensor]:
        """A peer's leaves: q, k and v, or q, k_nope, k_rope and v in a rope case; absorbed, of so many equal heads."""
        if self.absorbed:
            latent, k_rope = inputs["kv"].split((self.Dn, self.Dr), -1)
            k_nope = v = latent.unsqueeze(2).expand(-1, -1, heads, -1)
        else:
            k_nope, k_rope, v = (inputs[name] for name in ("k_nope", "k_rope", "v"))
        q, parts = inputs["q"], [k_nope, k_rope, v]
        if not self.rope:
            parts = [written_out(k_nope, k_rope.unsqueeze(2)), padded(v, q) if self.lengths else v]
        return [q, *(t.detach().contiguous().requires_grad_() for t in parts)]

    def calls(self, inputs: dict[str, torch.Tensor]) -> tuple[Callable[[str], torch.Tensor], list[torch.Tensor]]:
        """run(kernel or peer), and the leaves of all of them; a peer of packed sequences gives out padded as v is."""
        device, options = inputs["q"].device, self.options(inputs["q"].device)
        bounds, longest = options["cu_seqlens"], max(self.lengths, default=self.S)
        positions = None if bounds is None else positions_of(bounds, self.S)
        tables = rope_tables(longest, self.Dr, THETA, device=device)
        rows = [torch.cat((t, t), -1) if bounds is None else torch.cat((t, t), -1)[positions] for t in tables]
        rows = [t.unsqueeze(1).to(inputs["q"].dtype) for t in rows]
        shared = (False, True) if self.absorbed else (False,)
        theirs = {one: self.written_out(inputs, 1 if one else self.H) for one in shared}

        def ours(kernel: str) -> torch.Tensor:
            given = dict(inputs)
            if self.rope:
                key = "kv" if self.absorbed else "k_rope"
                given["q"] = mla_queries(given["q"], *tables, positions=positions)
                given[key] = mla_latents(None, given[key], *tables, positions=positions)[1]
            return OPERATORS[self.op](**given, **options, kernel=kernel)

        def run(name: str) -> torch.Tensor:
            if not name.startswith("peer:"):
                return ours(name)
            tensors = theirs["-mqa" in name]
            if self.rope:
                prepare = compiled() if name.endswith("-compiled") else prepared
                tensors = prepare(*tensors, *rows, wide=bool(self.lengths))
            if self.lengths:
                return packed(*tensors, options["scale"], bounds, longest)
            return whole(*tensors, options["scale"])

        return run, list({id(t): t for t in (*inputs.values(), *sum(theirs.values(), []))}.values())

    def flops(self) -> dict[str, float]:
        """Forward: q kᵀ and p v where a score is seen; backward twice that, without the scores it computes again."""
        scores = self.B * self.H * sum(length * (length + 1) / 2 for length in self.lengths or (self.S,))
        forward = 2 * scores * (self.Dn + self.Dr + self.Dv)
        return {"fwd": forward, "fwd+bwd": 3 * forward}

    def moved(self) -> dict[str, float]:
        """Forward: ours reads its inputs and writes out; backward: reads them, out and dout, writes their gradients."""
        shared = self.Dn + self.Dr if self.absorbed else self.H * (self.Dn + self.Dv) + self.Dr
        rows = 2 * self.B * self.S
        read, out = rows * (self.H * (self.Dn + self.Dr) + shared), rows * self.H * self.Dv
        return {"fwd": read + out, "fwd+bwd": 3 * read + 3 * out}


@functools.cache
def compiled() -> Callable[..., tuple[torch.Tensor, ...]]:
    return torch.compile(prepared, fullgraph=True, dynamic=False)


EQUAL, RAGGED = (1024,) * 8, (6001, 4096, 2900, 1777, 1024, 333, 252, 1)
SIZES: tuple[dict[str, Any], ...] = (
    {"B": 2, "S": 4096},
    {"B": 1, "S": 16384},
    {"B": 1, "S": 65536},
    {"B": 1, "S": sum(EQUAL), "lengths": EQUAL},
    {"B": 1, "S": sum(RAGGED), "lengths": RAGGED},
)
WIDE: dict[str, Any] = {"Dn": 128, "Dv": 128}
CASES = (
    *(Case("latent_attention", **size, rope=rope) for rope in (False, True) for size in SIZES),
    *(Case("mla_attention", **size) for size in SIZES if size["S"] < 65536),
    *(Case("mla_attention", **size, **WIDE, rope=rope) for rope in (False, True) for size in SIZES),
    Case("mla_attention", 1, 4096, H=28),
    Case("mla_attention", 1, 4096, H=128, **WIDE),
    Case("latent_attention", 1, 4096, H=128, Dn=512, Dv=512),
)
JUDGED = (Case("latent_attention", 1, 1024), Case("mla_attention", 1, 1024, **WIDE))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_mla(measure, case):
    torch.compiler.reset()  # a function is compiled for at most eight shapes
    run, grad = case.calls(case.inputs())
    measure(case.op, case.name, case.kernel, run, grad=grad, flops=case.flops(), moved=case.moved(), peers=case.peers)


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case.op)
def test_error(pytestconfig, case):
    """Ours errs at most twice what plain PyTorch in bf16 does, in y and in every gradient; cuDNN's is kept beside."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: only errors measured on a GPU are recorded")
    inputs, options = case.inputs(), case.options()

    def run(kernel: str, **given: torch.Tensor) -> torch.Tensor:
        if kernel == PLAIN:
            return getattr(reference, case.op)(**given, **options, compute_dtype=given["q"].dtype)
        return OPERATORS[case.op](**given, **options, kernel=kernel)

    dy = torch.randn(case.B, case.S, case.H, case.Dv, dtype=torch.bfloat16, device="cuda")
    found = errors(run, inputs, dy, ("cuda", PEER, PLAIN))
    keep_errors(pytestconfig.getoption("--results"), case.op, case.name, Device.of("cuda").name, found)
    worse = {name: by_kernel for name, by_kernel in found.items() if not by_kernel["cuda"] <= 2 * by_kernel[PLAIN]}
    assert not worse, f"more than twice as far from float64 as PyTorch in bf16: {worse}"
