"""The runtime patch surface: every change to Megatron's behaviour, by name, and nothing outside this list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megatron.core
import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer import multi_token_prediction

VERSIONS = ("0.19.",)


@dataclass(frozen=True)
class Patch:
    """One change. `target` is what changes, `versions` the prefixes of megatron-core versions it is known for.

    apply() makes the change, and may be called again; verify() says whether it is in force.
    """

    name: str
    target: str
    reason: str
    versions: tuple[str, ...]
    apply: Callable[[], None]
    verify: Callable[[], bool]


def _add_symbol() -> None:
    Symbols.M2RNN = "R"
    Symbols.VALID_LAYERS = Symbols.VALID_LAYERS | {"R"}


_acceptance = multi_token_prediction._compute_mtp_acceptance_counts


def _acceptance_without_logits(logits, labels, loss_mask, output_layer, *rest):  # type: ignore[no-untyped-def]
    if getattr(output_layer, "deferred", False):
        return torch.zeros_like(loss_mask.sum()), torch.zeros_like(loss_mask.sum())
    return _acceptance(logits, labels, loss_mask, output_layer, *rest)


def _patch_acceptance() -> None:
    multi_token_prediction._compute_mtp_acceptance_counts = _acceptance_without_logits


PATCHES = (
    Patch(
        "r-symbol",
        "megatron.core.models.hybrid.hybrid_layer_allocation.Symbols.VALID_LAYERS",
        "Megatron's pattern grammar has no letter for a recurrent layer, and R may not pose as another",
        VERSIONS,
        _add_symbol,
        lambda: "R" in Symbols.VALID_LAYERS,
    ),
    Patch(
        "mtp-acceptance",
        "megatron.core.transformer.multi_token_prediction._compute_mtp_acceptance_counts",
        "MTP's acceptance metric takes an argmax over whole logits, which a fused loss never has: 0 of 0 instead",
        VERSIONS,
        _patch_acceptance,
        lambda: multi_token_prediction._compute_mtp_acceptance_counts is _acceptance_without_logits,
    ),
)


def apply_patches(patches: tuple[Patch, ...] = PATCHES) -> None:
    """Apply and verify each patch. Raises RuntimeError on a megatron-core version it isn't known for, or that it didn't take."""
    version = megatron.core.__version__
    for patch in patches:
        if not version.startswith(patch.versions):
            known = ", ".join(f"{v}x" for v in patch.versions)
            raise RuntimeError(f"patch {patch.name} is known for megatron-core {known}, not for {version}")
        patch.apply()
        if not patch.verify():
            raise RuntimeError(f"patch {patch.name} did not take on {patch.target}")
