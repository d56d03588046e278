"""DeepSeek sparse attention, causal: the indexer, its parts, and the whole beside dense attention and beside Megatron.

The whole is index, select and attend; backward too, the indexer's KL loss is in it. Its peers are dense attention by
cuDNN, which needs no indexer, on keys and values written out for every head beforehand and, named -mqa, on one head that
all share; and Megatron without fused kernels, whose scores are stored, as far as memory goes. "triton_atomic", which has
a record of its own, adds up dkv and dk by atomics; so has the indexer's "cuda_fp8", which isn't part of the whole. Inputs
are random: what queries choose is spread over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.peers.cudnn import whole as dense
from bench.peers.cudnn import written_out
from bench.peers.megatron import top_k_and_loss
from nam56r.kernels.dsa import index_top_k, indexer_kl_loss, sparse_latent_attention

L, ROPE, H, HI, DI = 64, 64, 32, 32, 64  # the recipe's
SCALE = (L + ROPE) ** -0.5
MEGATRON, CUDNN = "peer:megatron", "peer:cudnn"
KERNELS = "triton", "triton_atomic"
LONGEST = 16384  # that Megatron's scores are tried for; and a backward pass beside dense attention, 65536


@dataclass(frozen=True)
class Case:
    B: int
    S: int
    top_k: int

    @property
    def name(self) -> str:
        return f"B{self.B} S{self.S} H{H} top{self.top_k}"

    def inputs(self, device: str = "cuda") -> dict[str, torch.Tensor]:
        """Of the indexer, and of attention."""
        torch.manual_seed(0)
        rows = self.B, self.S
        shapes = {
            "index_q": (*rows, HI, DI), "index_k": (*rows, DI), "index_weights": (*rows, HI),
            "q": (*rows, H, L + ROPE), "kv": (*rows, L + ROPE),
        }  # fmt: skip
        return {n: torch.randn(s, dtype=torch.bfloat16, device=device).requires_grad_() for n, s in shapes.items()}

    @property
    def pairs(self) -> float:
        return self.B * self.S * (self.S + 1) / 2

    @property
    def chosen(self) -> float:
        """Pairs of a query and a key that it chose."""
        few = min(self.S, self.top_k)
        return self.B * (few * (few + 1) / 2 + (self.S - few) * self.top_k)

    def flops(self, *, index: bool, attention: bool, loss: bool) -> dict[str, float]:
        """What the definitions need: attention's backward is twice its forward, the loss has the scores of both again.

        The loss's gradients are three products of the indexer's size over the chosen keys.
        """
        scores, attend = 2 * self.pairs * HI * DI, 2 * self.chosen * H * (2 * L + ROPE)
        again = 2 * self.chosen * (H * (L + ROPE) + HI * DI)
        forward = scores * index + attend * attention
        return {"fwd": forward + again * (loss and not attention), "fwd+bwd": forward + 2 * attend * attention
                + loss * (again + 3 * 2 * self.chosen * HI * DI)}  # fmt: skip


SIZES = ((2, 4096), (1, 8192), (1, 16384), (1, 65536), (1, 262144))
CASES = [Case(B, S, top_k) for B, S in SIZES for top_k in (256, 2048)]
SHORT = [case for case in CASES if case.S <= 65536]


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_index(measure, case):
    x = [t.detach() for t in list(case.inputs().values())[:3]]
    flops = case.flops(index=True, attention=False, loss=False)
    for kernel, peers in (("cuda", (MEGATRON,) if case.S <= LONGEST else ()), ("cuda_fp8", ())):
        measure(
            "index_top_k",
            case.name,
            kernel,
            lambda name: index_top_k(*x, case.top_k, kernel=name),
            flops=flops,
            peers=peers,
        )


def chosen_by(case: Case, x: dict[str, torch.Tensor]) -> torch.Tensor:
    return index_top_k(x["index_q"], x["index_k"], x["index_weights"], case.top_k)


@pytest.mark.parametrize("case", SHORT, ids=ids)
def test_attention(measure, case):
    x = case.inputs()
    indices, leaves = chosen_by(case, x), [x["q"], x["kv"]]

    def run(name: str) -> torch.Tensor:
        return sparse_latent_attention(*leaves, indices, value_dim=L, scale=SCALE, kernel=name)[0]

    flops = case.flops(index=False, attention=True, loss=False)
    for kernel in KERNELS:
        measure("sparse_latent_attention", case.name, kernel, run, grad=leaves, flops=flops)


@pytest.mark.parametrize("case", SHORT, ids=ids)
def test_loss(measure, case):
    x = case.inputs()
    indices = chosen_by(case, x)
    _, lse = sparse_latent_attention(x["q"], x["kv"], indices, value_dim=L, scale=SCALE)
    leaves = [x["index_q"], x["index_k"], x["index_weights"]]

    def run(name: str) -> torch.Tensor:
        return indexer_kl_loss(**x, indices=indices, lse=lse, scale=SCALE, kernel=name)

    flops = case.flops(index=False, attention=False, loss=True)
    for kernel in KERNELS:
        measure("indexer_kl_loss", case.name, kernel, run, grad=leaves, flops=flops)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_whole(measure, case):
    x = case.inputs()
    latent, rope = x["kv"].detach().unsqueeze(2).split((L, ROPE), -1)
    backward = case.S <= 65536  # beyond, dense attention's takes seconds
    heads = {CUDNN: H, f"{CUDNN}-mqa": 1}
    expanded = {}
    for peer, count in heads.items():
        v = latent.expand(-1, -1, count, -1).contiguous()
        expanded[peer] = [t.requires_grad_() for t in (written_out(v, rope), v)]

    def ours(kernel: str) -> tuple[torch.Tensor, ...]:
        indices = chosen_by(case, x)
        out, lse = sparse_latent_attention(x["q"], x["kv"], indices, value_dim=L, scale=SCALE, kernel=kernel)
        if not torch.is_grad_enabled():
            return (out,)
        return out, indexer_kl_loss(**x, indices=indices, lse=lse, scale=SCALE, kernel=kernel).mean()

    def megatron() -> tuple[torch.Tensor, ...]:
        index = x["index_q"], x["index_k"], x["index_weights"], case.top_k
        if torch.is_grad_enabled():
            indices, loss = top_k_and_loss(*index, x["q"], x["kv"], SCALE)
        else:
            indices, loss = index_top_k(*index, kernel=MEGATRON), None
        attend: dict[str, Any] = {"value_dim": L, "scale": SCALE, "kernel": MEGATRON}
        out = sparse_latent_attention(x["q"], x["kv"], indices.int(), **attend)[0]
        return (out,) if loss is None else (out, loss)

    def run(name: str) -> tuple[torch.Tensor, ...]:
        if name == MEGATRON:
            return megatron()
        return (dense(x["q"], *expanded[name], SCALE),) if name in expanded else ours(name)

    leaves = [*x.values(), *(t for tensors in expanded.values() for t in tensors)] if backward else []
    peers = (*expanded, *((MEGATRON,) if case.S <= 4096 else ()))
    flops = case.flops(index=True, attention=True, loss=True)
    for kernel, beside in zip(KERNELS, (peers, ())):
        measure("sparse_latent_attention", f"{case.name} whole", kernel, run, grad=leaves, flops=flops, peers=beside)
