"""A plan as text that reads at 80 columns without colour: slots that are alike together, one line an operator."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from nam56r.memory import GIB, estimate
from nam56r.parameters import parameters
from nam56r.plan import Part, Plan
from nam56r.recipe import Recipe

OPERATOR_WIDTH, KERNEL_WIDTH = 26, 11


def render(plan: Plan, recipe: Recipe, width: int = 80) -> str:
    """A plan, accepted or refused: every slot, its operators with kernel and reason, and the totals; width in columns."""
    where = f"{plan.device}, {plan.dtype}, micro-batch {plan.micro_batch}, TP {plan.tensor_parallel}"
    lines = [
        f"{plan.recipe} on {where}: {'accepted' if plan.accepted else 'refused'}",
        *(wrap(line, width, 2) for line in _totals(plan, recipe)),
        "",
        _row("slot", "kernel", "reason", width),
        "-" * width,
    ]
    for heading, members, reasons in groups(plan):
        lines.append(wrap(heading, width, 10))
        kernels = members[0].part.kernels
        lines += [_row(f"  {op}", kernels.get(op, "REFUSED"), why, width) for op, why in reasons.items()]
    lines += [wrap(f"note: {note}", width, 6) for note in plan.notes]
    asked = {(place.layer, operator) for place in places(plan) for operator in place.part.shapes}
    for refusal in plan.refusals:
        if (refusal.layer, refusal.operator) not in asked:
            at = f"layer {refusal.layer}" if isinstance(refusal.layer, int) else refusal.layer
            lines.append(wrap(f"refused: {refusal.operator} ({at}): {'; '.join(refusal.reasons)}", width, 9))
    if plan.refusals:
        slots = len({refusal.layer for refusal in plan.refusals})
        hint = "--kernel OPERATOR=NAME asks for a kernel that isn't chosen freely"
        lines.append(wrap(f"refused in {slots} place{'s' * (slots > 1)}; {hint}", width, 2))
    return "\n".join(lines)


def wrap(text: str, width: int, indent: int) -> str:
    """Text in lines of at most width columns, all but the first indented."""
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


class Place(NamedTuple):
    """One part of the model, under the name that refusals call it by."""

    layer: int | str
    name: str
    seams: tuple[str, ...]
    part: Part


def places(plan: Plan) -> list[Place]:
    """Every slot, MTP depth and the head, in order."""
    return [
        *(Place(slot.layer, f"{slot.symbol} {slot.role}", slot.seams, slot) for slot in plan.slots),
        *(Place(f"mtp {depth}", "MTP", (), part) for depth, part in enumerate(plan.mtp, 1)),
        Place("head", "head", (), plan.head),
    ]


def groups(plan: Plan) -> Iterator[tuple[str, list[Place], dict[str, str]]]:
    """(heading, members, reason by operator) for the parts with the same role, seams and choices."""
    refused = {(refusal.layer, refusal.operator): "; ".join(refusal.reasons) for refusal in plan.refusals}
    alike: dict[tuple, list[Place]] = {}
    for place in places(plan):
        part = place.part
        reasons = tuple((op, refused.get((place.layer, op)) or part.reasons[op]) for op in part.shapes)
        alike.setdefault((place.name, place.seams, tuple(part.kernels.items()), reasons), []).append(place)
    for (name, seams, _, reasons), members in alike.items():
        numbers = " ".join(str(place.layer).removeprefix("mtp ") for place in members)
        noun = ("depth" if name == "MTP" else "layer") + "s" * (len(members) > 1)
        heading = name if name == "head" else f"{name}  {noun} {numbers}"
        seam = f"  [seam: {', '.join(seams)}, custom code in Megatron]" if seams else ""
        yield heading + seam, members, dict(reasons)


def counts(plan: Plan) -> str:
    """Layers by symbol, and the MTP depths: "13 A (9 sparse), 22 E, 13 M, 4 R, 2 MTP"."""
    sparse = sum(slot.role == "dsa" for slot in plan.slots)
    by_symbol = (
        f"{count} {symbol}" + (f" ({sparse} sparse)" if symbol == "A" and sparse else "")
        for symbol, count in plan.counts.items()
    )
    return f"{', '.join(by_symbol)}, {len(plan.mtp)} MTP"


def size(recipe: Recipe) -> str:
    """The parameters, and how many of them one token meets."""
    total, active = (sum(family) for family in zip(*parameters(recipe).values(), strict=True))
    return f"{short(total)} parameters, {short(active)} active"


def _totals(plan: Plan, recipe: Recipe) -> tuple[str, str, str]:
    estimated = estimate(recipe, plan)
    forward, backward = plan.flops_per_token["forward"], plan.flops_per_token["backward"]
    return (
        f"{counts(plan)}; {size(recipe)}",
        f"{short(forward + backward)}FLOP a token: {short(forward)} forward, {short(backward)} backward",
        f"{estimated.total / GIB:.2f} GiB estimated on one device: {estimated}",
    )


def short(number: float) -> str:
    """Three digits and a prefix, for a unit to follow: "12.3 G"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def _row(operator: str, kernel: str, reason: str, width: int) -> str:
    start = f"{operator:<{OPERATOR_WIDTH}}{kernel:<{KERNEL_WIDTH}}"
    return wrap(start + reason, width, len(start))
