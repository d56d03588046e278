"""Which feature may sit on which block family, and which of them has an implementation.

A recipe implies some features by its own fields (MLA, DSA, MoE, Mamba-2 or Mamba-3, MIMO, M²RNN, MTP) and names others
under `features`. A name without implementation is refused with that reason; a wrong family or layer is refused always.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from nam56r.recipe import Recipe


@dataclass(frozen=True)
class Feature:
    """One feature: the symbol of the family it belongs to (None: global) and what it is."""

    name: str
    symbol: str | None
    what: str
    implemented: bool = False


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("mla", "A", "multi-head latent attention", True),
        Feature("dsa", "A", "DeepSeek sparse attention", True),
        Feature("engram", "A", "Engram memory"),
        Feature("mhc", "A", "manifold-constrained hyper-connections"),
        Feature("moe", "E", "mixture of experts", True),
        Feature("mod", "E", "mixture of depths"),
        Feature("mamba2", "M", "Mamba-2 state space", True),
        Feature("mamba3", "M", "Mamba-3 state space", True),
        Feature("mimo", "M", "Mamba-3 with several inputs and outputs a step", True),
        Feature("m2rnn", "R", "M²RNN recurrence", True),
        Feature("ngram_hash", None, "n-gram hash embedding on the input side"),
        Feature("structure_signals", None, "structure signals in the data"),
        Feature("mtp", None, "multi-token prediction on the last stage", True),
    )
}
FAMILY_NAME = {"A": "attention", "E": "experts", "M": "Mamba", "R": "M²RNN"}


@dataclass(frozen=True)
class Misplaced:
    """Why a feature can't be where a recipe has it; layer is None for a fault of the whole model."""

    feature: str
    layer: int | None
    reason: str


def implied(recipe: Recipe, layer: int) -> tuple[str, ...]:
    """The features that a layer has by the recipe's own fields."""
    role = recipe.roles[layer - 1]
    if role == "dsa":
        return ("mla", "dsa")
    if role == "mamba3" and recipe.mamba.mimo_rank > 1:
        return ("mamba3", "mimo")
    return (role,)


def global_features(recipe: Recipe) -> tuple[str, ...]:
    """Features of the whole model: MTP where there are depths, then those the recipe names."""
    named = (name for name in recipe.features if name in FEATURES and FEATURES[name].symbol is None)
    return tuple(dict.fromkeys((*(("mtp",) if recipe.mtp.num_depths else ()), *named)))


def on_layer(recipe: Recipe, layer: int) -> tuple[str, ...]:
    """Features of a layer: the implied ones, then those the recipe places there."""
    named = (name for name, layers in recipe.features.items() if layer in layers)
    return tuple(dict.fromkeys((*implied(recipe, layer), *named)))


def misplaced(recipe: Recipe) -> tuple[Misplaced, ...]:
    """Everything wrong with the features that a recipe names, all at once."""
    found = []
    symbols = recipe.layers.layers
    for name, layers in recipe.features.items():
        feature = FEATURES.get(name)
        if feature is None:
            near = difflib.get_close_matches(name, FEATURES, 1, 0.0)[0]
            known = ", ".join(FEATURES)
            found.append(Misplaced(name, None, f"unknown feature {name}: the nearest is {near}; there are {known}"))
            continue
        if not feature.implemented:
            found.append(Misplaced(name, None, f"{name} ({feature.what}) has no implementation: leave it out"))
        if feature.symbol is None:
            if layers:
                found.append(Misplaced(name, None, f"{name} is global and takes no layers, but has {list(layers)}"))
            elif feature.implemented and name not in global_features(recipe.model_copy(update={"features": {}})):
                found.append(Misplaced(name, None, f"{name} is named, but mtp.num_depths is 0"))
            continue
        family = f"{feature.symbol} ({FAMILY_NAME[feature.symbol]})"
        if not layers:
            found.append(Misplaced(name, None, f"{name} names no layer: list {family} layers"))
        for layer in layers:
            if not 1 <= layer <= recipe.depth:
                reason = f"{name} names layer {layer}, but layers go from 1 to {recipe.depth}"
            elif symbols[layer - 1] != feature.symbol:
                reason = f"{name} belongs on {family} layers, but layer {layer} is {symbols[layer - 1]}"
            elif feature.implemented and name not in implied(recipe, layer):
                reason = f"{name} is named on layer {layer}, but the recipe's own fields don't put it there"
            else:
                continue
            found.append(Misplaced(name, layer, reason))
    return tuple(found)
