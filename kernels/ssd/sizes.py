"""What the kernels of a scan have to agree on: chunks, spans, segments, units, and how they are numbered."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAMBA2, SISO, MIMO = 0, 1, 2  # the model: nothing turned; adjacent pairs turned; pairs N / 2 apart, Ψ, ζ, Φ
ROWS = 64  # of a chunk's scores: its tokens times the rank
SPANS = 2, 1  # chunks of a span: the most that leave
BLOCKS = 128  # blocks for a segment
COLUMNS = 64  # of a unit
MOST_UNITS = 16  # of one block
MOST_ROWS = 65535  # CUDA's bound of a grid's y
SCRATCH = 9 * 2**25  # bytes that the backward takes for a segment's states and their gradients, in 16 bits, and turns,
LEAST_SPANS = 8  # unless these, of every sequence, take more


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens. A head's P columns are `blocks` units of `columns`; `units` of them are one block's work.

    Spans are numbered without a sum over sequences: span k of sequence i is first[i] + k, where first[i] is i times
    `spans` in a batch, and cu_seqlens[i] // span + i when packed, which leaves some numbers unused. There are `total`
    numbers. Chunk j of a span is span number * every + j.

    The backward takes a segment at a time, the last first: segment s is the spans from s * segment_spans on, of every
    sequence of a batch, of all numbers when packed. What of it lies in one sequence is a part. A span's place in its
    segment is a number too: sequence * segment_spans + k - s * segment_spans, when packed number - s * segment_spans.
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
    segment_spans: int
    segments: int
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
        return min(self.headdim, COLUMNS)

    @property
    def blocks(self) -> int:
        return self.headdim // self.columns

    @property
    def all_units(self) -> int:
        return self.heads * self.blocks

    @property
    def tile(self) -> int:
        return tile_of(self.d_state)

    @property
    def turns(self) -> int:
        """32-bit numbers that a chunk's turns take."""
        return turns_of(self.chunk, self.pairs, self.d_state)

    @property
    def total(self) -> int:
        """Numbers of spans."""
        return self.spans if self.packed else self.sequences * self.spans

    @property
    def chunks(self) -> int:
        """Numbers of chunks."""
        return self.total * self.every

    @property
    def places(self) -> int:
        """Of a segment's spans."""
        return self.segment_spans if self.packed else self.sequences * self.segment_spans

    @property
    def parts(self) -> int:
        """Numbers of parts: of sequence i in segment s it is i * segments + s, when packed i + s."""
        return self.sequences + self.segments if self.packed else self.sequences * self.segments

    @property
    def angle_rows(self) -> int:
        """Sums that the angles' gradients are made in: one a block's heads, or one a unit."""
        return self.groups * self.splits if self.angle_heads == 1 else self.all_units


def tile_of(d_state: int) -> int:
    """Elements of a unit's state as it lies in shared memory: in rows of 64 at least."""
    return COLUMNS * max(d_state, 64)


def turns_of(chunk: int, pairs: int, d_state: int) -> int:
    """32-bit numbers of a chunk's turns as csrc/ssd has them in shared memory (Turns): padded where there is room."""
    return chunk * (pairs + (4 if chunk * d_state <= 8192 else 0)) if pairs else 0


def sizes_of(
    model: int, x: torch.Tensor, B: torch.Tensor, angles: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Sizes:
    """x [B, S, H, P], B [B, S, R, G, N], angles [B, S, 1 or H, N_a]; raises ValueError for too many sequences."""
    (batch, length, heads, headdim), (rank, groups, d_state) = x.shape, B.shape[2:]
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else batch
    if sequences > MOST_ROWS:
        raise ValueError(f"there are {sequences} sequences, but the CUDA scan takes at most {MOST_ROWS}")
    chunk, blocks = ROWS // rank, headdim // min(headdim, COLUMNS)
    of_group = heads // groups * blocks
    units = next(n for n in range(min(of_group, MOST_UNITS), 0, -1) if of_group % n == 0)
    pairs = 0 if angles is None else angles.shape[3]
    rows = 1 if packed else max(1, sequences)
    fit = SCRATCH // (heads * (2 * blocks * tile_of(d_state) * 2 + turns_of(chunk, pairs, d_state) * 4))
    splits = of_group // units
    at_once = min(fit, rows * -(-length // chunk)) * groups * splits  # blocks, if they had one chunk each
    every = next((n for n in SPANS if at_once >= n * BLOCKS), 1)
    span = every * chunk
    spans = length // span + sequences if packed else -(-length // span)
    most = max(1, spans)
    longest = min(max(LEAST_SPANS, fit // (every * rows)), MOST_ROWS // rows)
    whole = max(1, BLOCKS // (rows * groups * splits))  # spans that give a GPU's SMs a block each
    segment_spans = min(most, longest // whole * whole or longest)
    return Sizes(
        model, batch, length, heads, headdim, rank, groups, d_state,
        pairs, 1 if angles is None else angles.shape[2], packed, sequences,
        chunk, every, spans, segment_spans, -(-most // segment_spans), units, splits,
    )  # fmt: skip
