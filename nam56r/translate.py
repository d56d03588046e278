"""From an authored recipe to what Megatron has symbols for, and what it hasn't.

A lowers to `+` (MLA) or `D` (DSA), E to `E`, M to `M`; MTP is a suffix. Mamba-3 is authored behind `M`, which Megatron
takes for Mamba-2, and R has no symbol at all: both are seams, kept visible and listed in the notes. Nothing is renamed
to look more native than it is.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from nam56r import features
from nam56r.pattern import Pattern
from nam56r.recipe import Recipe, Role

NATIVE = {"mla": "+", "dsa": "D", "moe": "E", "mamba3": "M", "mamba2": "M"}
VISIBLE = NATIVE | {"m2rnn": "R"}
MTP_DEPTH = "+-"
_SEAM_NOTES = {
    "mamba3": "M is Mamba-3: Megatron's own M is Mamba-2, so the block is ours",
    "m2rnn": "R is M²RNN: Megatron has no symbol for it, so the symbol and the block are ours",
}


class TranslatedSlot(BaseModel):
    """One layer: its authored symbol, what it is, and the symbol it has in the native pattern (R stays R)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    symbol: str
    role: Role
    native: str
    seams: tuple[str, ...]
    features: tuple[str, ...]


class Refusal(BaseModel):
    """Why a recipe can't be built: where (a layer's number, "head", "mtp 1", "model"), which operator or feature."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int | str
    operator: str
    reasons: tuple[str, ...]


class TranslationPlan(BaseModel):
    """A recipe beside what it lowers to. JSON in and out through pydantic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_pattern: str
    slots: tuple[TranslatedSlot, ...]
    counts: dict[str, int]
    native_pattern: str
    mtp_suffix: str
    custom_notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    @property
    def requires_custom_mamba3(self) -> bool:
        return any(slot.role == "mamba3" for slot in self.slots)

    @property
    def requires_custom_m2rnn(self) -> bool:
        return any(slot.role == "m2rnn" for slot in self.slots)

    @property
    def fully_native(self) -> bool:
        """No seam and no refusal is left."""
        return not self.refusals and not any(slot.seams for slot in self.slots)


def translate(recipe: Recipe) -> TranslationPlan:
    """Expand a recipe slot by slot. Faults of its features are in `refusals`, all of them; nothing is raised."""
    pattern = recipe.layers
    slots = tuple(
        TranslatedSlot(
            layer=number,
            symbol=symbol,
            role=role,
            native=VISIBLE[role],
            seams=(symbol,) if role in _SEAM_NOTES else (),
            features=features.on_layer(recipe, number),
        )
        for number, (symbol, role) in enumerate(zip(pattern.layers, recipe.roles, strict=True), 1)
    )
    suffix = f"/{MTP_DEPTH}" * recipe.mtp.num_depths
    return TranslationPlan(
        source_pattern=recipe.pattern,
        slots=slots,
        counts=pattern.counts,
        native_pattern=_divided(pattern, "".join(slot.native for slot in slots)) + suffix,
        mtp_suffix=suffix,
        custom_notes=_notes(slots),
        refusals=tuple(
            Refusal(layer=fault.layer or "model", operator=fault.feature, reasons=(fault.reason,))
            for fault in features.misplaced(recipe)
        ),
    )


def _divided(pattern: Pattern, symbols: str) -> str:
    """Symbols with the pattern's stage boundaries."""
    rest: Any = iter(symbols)
    return "|".join("".join(next(rest) for _ in segment) for segment in pattern.segments)


def _notes(slots: tuple[TranslatedSlot, ...]) -> tuple[str, ...]:
    notes = []
    for role, what in _SEAM_NOTES.items():
        layers = [str(slot.layer) for slot in slots if slot.role == role]
        if layers:
            notes.append(f"{what} (layers {', '.join(layers)})")
    return tuple(notes)
