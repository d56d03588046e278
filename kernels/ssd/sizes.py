"""What the kernels of a scan have to agree on: chunks, spans, units, and how spans are numbered."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAMBA2, SISO, MIMO = 0, 1, 2  # the model: nothing turned; adjacent pairs turned; pairs N / 2 apart, Ψ, ζ, Φ
CHUNK = {1: 64, 2: 32, 4: 16, 8: 16}  # tokens of a chunk, by rank: 64 rows of scores, at rank 8 128
SPAN, SPAN_OF_RANKS = 128, 64  # tokens of a span; what is saved for the backward is one state a span
MOST_UNITS = 16  # of one block
MOST_SPANS = 65535  # CUDA's bound of a grid's y


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens. A head's P columns are `blocks` units of `columns`; `units` of them are one block's work.

    Spans are numbered without a sum over sequences: span k of sequence i is first[i] + k, where first[i] is i times
    `spans` in a batch, and cu_seqlens[i] // span + i when packed, which leaves some numbers unused. There are `total`
    numbers. Chunk j of a span is span number * every + j.
    """

    model: int
    batch: int
    length: int
    heads: int
    headdim: int
    rank: int
    groups: int
    d_state: int
    pairs: int  # N_a that are turned
    angle_heads: int
    packed: bool
    sequences: int
    chunk: int
    every: int
    spans: int  # of a sequence; all numbers when packed
    total: int
    units: int
    splits: int  # blocks that share a group

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def span(self) -> int:
        return self.every * self.chunk

    @property
    def columns(self) -> int:
        return min(self.headdim, 64)

    @property
    def blocks(self) -> int:
        return self.headdim // self.columns

    @property
    def all_units(self) -> int:
        return self.heads * self.blocks

    @property
    def chunks(self) -> int:
        """Numbers of chunks."""
        return self.total * self.every

    @property
    def wide_rows(self) -> tuple[int, int]:
        """Where the angles' gradients of q, and of k, are summed: over a block's heads, or not at all."""
        return (self.groups * self.splits if self.angle_heads == 1 else self.all_units), self.tokens


def sizes_of(
    model: int, x: torch.Tensor, B: torch.Tensor, angles: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Sizes:
    """x [B, S, H, P], B [B, S, R, G, N], angles [B, S, 1 or H, N_a]; raises ValueError for too many sequences."""
    (batch, length, heads, headdim), (rank, groups, d_state) = x.shape, B.shape[2:]
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else batch
    if sequences > MOST_SPANS // 2:
        raise ValueError(f"there are {sequences} sequences, but the CUDA scan takes at most {MOST_SPANS // 2}")
    chunk = CHUNK[rank]
    every = max(1, (SPAN_OF_RANKS if model == MIMO and rank > 1 else SPAN) // chunk)
    while True:
        span = every * chunk
        spans = length // span + sequences if packed else -(-length // span)
        total = spans if packed else batch * spans
        if total <= MOST_SPANS:
            break
        every *= 2
    of_group = heads // groups * (headdim // min(headdim, 64))
    units = next(n for n in range(min(of_group, MOST_UNITS), 0, -1) if of_group % n == 0)
    return Sizes(
        model, batch, length, heads, headdim, rank, groups, d_state,
        0 if angles is None else angles.shape[3], 1 if angles is None else angles.shape[2], packed, sequences,
        chunk, every, spans, total, units, of_group // units,
    )  # fmt: skip
