"""The grammar of layer patterns: A, M, E, R for blocks, `|` between pipeline stages, `/…` for each depth of MTP.

    AEMEAEMEAEMR            a period, tiled to the depth
    AEME|AEME|AEMR          a whole model of 12 layers in three pipeline stages
    AEMEAEMEAEMR/+-/+-      two MTP depths, each one dense MLA (`+`) and one dense MLP (`-`)

Layers are numbered from 1. Nothing is renamed and nothing is dropped: what isn't in the grammar is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from nam56r.records import shown

SYMBOLS = "AEMR"
MTP_SYMBOLS = "+-"
MAX_DEPTH = 1024
_MEANING = "A (attention), E (experts), M (Mamba), R (M²RNN)"


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern. `str(parse(text)) == text`.

    segments    the pipeline stages' blocks, in order; one where the pattern has no `|`
    mtp         the blocks of one MTP depth; empty without MTP
    mtp_depths  how many prediction depths the pattern has
    """

    segments: tuple[str, ...]
    mtp: str = ""
    mtp_depths: int = 0

    def __str__(self) -> str:
        return "|".join(self.segments) + f"/{self.mtp}" * self.mtp_depths

    @property
    def layers(self) -> str:
        """The symbols of all layers, in order, without `|`."""
        return "".join(self.segments)

    @property
    def counts(self) -> dict[str, int]:
        """Layers by symbol, in the order A, E, M, R."""
        return {symbol: self.layers.count(symbol) for symbol in SYMBOLS}

    def numbers(self, symbol: str) -> tuple[int, ...]:
        """The 1-based numbers of a family's layers; a layer's index in them is its rank."""
        if len(symbol) != 1 or symbol not in SYMBOLS:
            raise ValueError(f"{symbol!r} is no block symbol: one of {_MEANING}")
        return tuple(number for number, s in enumerate(self.layers, 1) if s == symbol)

    def rank(self, layer: int) -> int:
        """Which of its family a layer is, from 0. Raises ValueError outside 1 … depth."""
        if not 1 <= layer <= len(self.layers):
            raise ValueError(f"layer {layer} is outside the pattern: layers go from 1 to {len(self.layers)}")
        return self.layers[: layer - 1].count(self.layers[layer - 1])

    def tile(self, depth: int) -> Pattern:
        """Repeat the period up to `depth` layers, the last period cut short where depth is no multiple.

        A pattern with `|` already places every layer, so its length must be the depth. Raises ValueError.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth is {depth!r}, but must be a whole number from 1 to {MAX_DEPTH}")
        period = self.layers
        if len(self.segments) > 1:
            if len(period) != depth:
                raise ValueError(
                    f"pattern {self} with | spells {len(period)} layers, but depth is {depth}: "
                    f"write all {depth} layers out, or leave out | to have a period tiled"
                )
            return self
        return Pattern(((period * -(-depth // len(period)))[:depth],), self.mtp, self.mtp_depths)


def parse(text: str) -> Pattern:
    """Read a pattern. Raises ValueError naming the character and its position (from 1), or what is empty or too long."""
    if not isinstance(text, str):
        raise ValueError(f"pattern is {shown(text)}, but must be text")
    main, *suffixes = text.split("/")
    if not main:
        raise ValueError(f"pattern {shown(text)} has no layers: write blocks of {_MEANING}")
    _only(text, main, 0, SYMBOLS + "|", f"blocks are {_MEANING}, stages are divided by |")
    segments = tuple(main.split("|"))
    for count, what in ((sum(map(len, segments)), "layers"), (len(suffixes), "MTP depths")):
        if count > MAX_DEPTH:
            raise ValueError(f"pattern {shown(text)} spells {count} {what}, but {MAX_DEPTH} are the most")
    if not all(segments):
        empty = segments.index("") + 1
        raise ValueError(f"pattern {shown(text)}: pipeline segment {empty} of {len(segments)} is empty")
    start = len(main) + 1
    for depth, suffix in enumerate(suffixes, 1):
        if not suffix:
            raise ValueError(f"pattern {shown(text)}: MTP depth {depth} is empty: write /+- for each depth")
        _only(text, suffix, start, MTP_SYMBOLS, "an MTP depth has + (dense MLA) and - (dense MLP) only")
        if suffix != suffixes[0]:
            raise ValueError(
                f"pattern {shown(text)}: MTP depth {depth} is {shown(suffix)}, but every depth must be {shown(suffixes[0])}"
            )
        start += len(suffix) + 1
    return Pattern(segments, suffixes[0] if suffixes else "", len(suffixes))


def _only(text: str, part: str, start: int, allowed: str, rule: str) -> None:
    for position, character in enumerate(part, start + 1):
        if character not in allowed:
            raise ValueError(f"pattern {shown(text)}: unknown character {character!r} at position {position}: {rule}")
