"""A plan as one HTML page that fetches nothing and runs no script: slots in order, bars, kernels, refusals.

Each slot is a link to its kernels further down, and says on hover, on keyboard focus and in its title what runs there.
Nothing is told by colour alone: families have symbols, sparse attention a dashed edge, a refused slot hatching and a ✕.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from nam56r.kernels.registry import Device
from nam56r.memory import GIB, estimate
from nam56r.parameters import FAMILIES, FAMILY
from nam56r.pattern import Pattern, parse
from nam56r.plan import Plan, Slot
from nam56r.recipe import Recipe
from nam56r.report.table import Place, counts, groups, places, short, size
from nam56r.translate import together

COLUMNS = 12  # slots in a row where the pattern's own period is longer than 16
NAMES = dict(
    zip(FAMILIES, ("attention", "experts", "Mamba", "M²RNN", "MTP", "embedding", "head", "norms"), strict=True)
)
ROLES = {
    "mla": ("MLA", "dense attention (MLA)"),
    "dsa": ("DSA", "sparse attention (DSA)"),
    "moe": ("MoE", "mixture of experts"),
    "mamba3": ("Mb-3", "Mamba-3"),
    "mamba2": ("Mb-2", "Mamba-2"),
    "m2rnn": ("M²R", "M²RNN"),
    "mtp": ("MTP", "MTP depth (MLA and SwiGLU)"),
    "head": ("head", "final norm, output layer and loss"),
}


class Html(str):
    """Markup. Every other string is text, and is escaped when it becomes a child or an attribute."""


def tag(name: str, *children: str, **attributes: str | None) -> Html:
    """One element; attributes that are None are left out, `class_` is class, `aria_label` is aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{given}>{inner}</{name}>")


def render(plan: Plan, recipe: Recipe, device: Device) -> str:
    """The page of a plan, accepted or refused, of this recipe on this device."""
    verdict = "accepted" if plan.accepted else "refused"
    title = f"{plan.recipe} on {plan.device}: {verdict}"
    heading = tag(
        "h1", tag("bdi", plan.recipe), " on ", tag("bdi", plan.device), ": ", tag("strong", verdict, class_=verdict)
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    )
    sections = (
        _section("Slots", *_slots(plan, recipe), _legend(plan)),
        _refusals(plan) if plan.refusals else Html(),
        _section("FLOPs a token", _flops(plan)),
        _section("Memory of one device, estimated", *_memory(plan, recipe, device)),
        _section("Kernels", *_kernels(plan)),
        _section("Native pattern", tag("p", tag("code", plan.native_pattern))),
        _section("Notes", tag("ul", *(tag("li", note) for note in plan.notes))) if plan.notes else Html(),
    )
    body = tag("body", tag("main", tag("header", heading, _facts(plan, recipe)), *sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}{tag("title", title)}<style>{CSS}</style></head>{body}</html>\n'
    )


def _section(heading: str, *children: str) -> Html:
    return tag("section", tag("h2", heading), *children)


def _facts(plan: Plan, recipe: Recipe) -> Html:
    facts = {
        "dtype": plan.dtype,
        "micro-batch": f"{plan.micro_batch} of {recipe.seq_length} tokens",
        "tensor parallelism": str(plan.tensor_parallel),
        "layers": counts(plan),
        "size": size(recipe),
        "global features": ", ".join(plan.features) or "none",
    }
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()), class_="facts")


def _slots(plan: Plan, recipe: Recipe) -> list[Html]:
    """The layers in rows of one period (or one pipeline segment), then the MTP depths and the head."""
    every, depth, pattern = places(plan), len(plan.slots), parse(recipe.pattern)
    targets = {
        place.layer: f"#kernels-{number}" for number, (_, members, _) in enumerate(groups(plan), 1) for place in members
    }
    rows, columns = _rows(pattern, depth)
    drawn, start = [], 0
    for number, length in enumerate(rows, 1):
        if len(pattern.segments) > 1:
            drawn.append(tag("h3", f"pipeline segment {number}"))
        row = every[start : start + length]
        drawn.append(_row(plan, row, targets, columns, f"layers {start + 1} to {start + length}"))
        start += length
    rest = "MTP depths and head" if plan.mtp else "head"
    return [*drawn, tag("h3", f"after the layers: {rest}"), _row(plan, every[depth:], targets, columns, rest)]


def _rows(pattern: Pattern, depth: int) -> tuple[list[int], int]:
    """How many layers each row has, and how many fit side by side."""
    if len(pattern.segments) > 1:
        rows = [len(segment) for segment in pattern.segments]
        return rows, max(rows) if max(rows) <= 16 else COLUMNS
    period = len(pattern.layers)
    columns = period if 4 <= period <= 16 else COLUMNS
    return [min(columns, depth - start) for start in range(0, depth, columns)], columns


def _row(plan: Plan, row: Sequence[Place], targets: dict[int | str, str], columns: int, label: str) -> Html:
    slots = [_slot(plan, place, targets[place.layer], right=i % columns >= columns / 2) for i, place in enumerate(row)]
    return tag("ol", *slots, class_="row", style=f"--columns:{columns}", aria_label=label)


def _slot(plan: Plan, place: Place, target: str, *, right: bool) -> Html:
    role = _role(place)
    refused = any(refusal.layer == place.layer for refusal in plan.refusals)
    classes = ("slot", _family(role), "sparse" * (role == "dsa"), "refused" * refused, "right" * right)
    symbol = place.part.symbol if isinstance(place.part, Slot) else {"mtp": "+-", "head": "→"}[role]
    name = f"about-{str(place.layer).replace(' ', '-')}"
    lines = _about(plan, place)
    shown = (
        tag("span", symbol, class_="symbol"),
        tag("span", ROLES[role][0], class_="role"),
        tag("span", "" if role == "head" else str(place.layer).removeprefix("mtp "), class_="number"),
        tag("span", "✕", class_="mark", role="img", aria_label="refused") if refused else Html(),
    )
    about = (tag("div", tag("dt", term), tag("dd", what)) for term, what in lines)
    return tag(
        "li",
        tag(
            "a",
            *shown,
            href=target,
            title="\n".join(f"{term}: {what}" for term, what in lines),
            aria_describedby=name,
        ),
        tag("div", tag("dl", *about), class_="about", role="tooltip", id=name),
        class_=" ".join(filter(None, classes)),
    )


def _about(plan: Plan, place: Place) -> list[tuple[str, str]]:
    """What there is to say of a part: what it is, seams, features, and each operator's kernel or refusal."""
    role, part = _role(place), place.part
    number = f"layer {place.layer}" if isinstance(part, Slot) else str(place.layer).replace("mtp", "MTP depth")
    symbol = f"{part.symbol}, " if isinstance(part, Slot) else ""
    lines = [(number, symbol + ROLES[role][1])]
    if place.seams:
        lines.append(("seam", f"{', '.join(place.seams)}: custom code in Megatron"))
    if isinstance(part, Slot) and part.features:
        lines.append(("features", ", ".join(part.features)))
    refused: dict[str, list[str]] = {}
    for refusal in plan.refusals:
        if refusal.layer == place.layer:
            refused.setdefault(refusal.operator, []).extend(refusal.reasons)
    for operator in dict.fromkeys((*part.shapes, *refused)):
        if operator in refused:
            lines.append((operator, f"✕ refused: {'; '.join(refused[operator])}"))
        else:
            lines.append((operator, f"{part.kernels[operator]} ({part.reasons[operator]})"))
    return lines


def _role(place: Place) -> str:
    if isinstance(place.part, Slot):
        return place.part.role
    return "head" if place.layer == "head" else "mtp"


def _family(role: str) -> str:
    return FAMILY.get(role, role)


def _legend(plan: Plan) -> Html:
    roles = [_role(place) for place in places(plan)]
    refused = len({refusal.layer for refusal in plan.refusals})
    seams = {slot.role for slot in plan.slots if slot.seams}
    entries = [
        (
            f"swatch {_family(role)}{' sparse' * (role == 'dsa')}",
            label,
            f"{what}{', a seam' * (role in seams)}: {roles.count(role)}",
        )
        for role, (label, what) in ROLES.items()
        if role in roles
    ]
    if refused:
        entries.append(("swatch head refused", "✕", f"refused: {refused} place{'s' * (refused > 1)}"))
    swatches = (tag("li", tag("span", text, class_=classes), " ", what) for classes, text, what in entries)
    return tag("ul", *swatches, class_="legend", aria_label="legend")


def _refusals(plan: Plan) -> Html:
    """What is refused for the same reasons, together."""
    items = []
    for (operator, reasons), layers in together(plan.refusals).items():
        numbers = all(layer.isdigit() for layer in layers)
        at = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}" if numbers else ", ".join(layers)
        items.append(tag("li", tag("h3", f"{operator} at {at}"), tag("ul", *(tag("li", why) for why in reasons))))
    return tag("section", tag("h2", "Refusals"), tag("ul", *items, class_="refusals"))


def _flops(plan: Plan) -> Html:
    by_family: dict[str, dict[str, float]] = {}
    for place in places(plan):
        before = by_family.setdefault(_family(_role(place)), {"forward": 0, "backward": 0})
        for direction in before:
            before[direction] += place.part.flops_per_token[direction]
    rows = [(family, (flops["forward"], flops["backward"])) for family, flops in by_family.items()]
    return _bars(("forward", "backward"), rows, lambda number: f"{short(number)}FLOP")


def _memory(plan: Plan, recipe: Recipe, device: Device) -> list[Html]:
    estimated = estimate(recipe, plan)
    rows: list[tuple[str, tuple[float, ...]]] = [
        (family, (held.weights + held.gradients + held.optimizer, held.activations, 0))
        for family, held in estimated.by_family.items()
        if held.total
    ]
    rows += [(name, (0, 0, getattr(estimated, name))) for name in ("logits", "workspace", "runtime")]
    of = ""
    if device.memory_gib:
        than = ", more than" if estimated.total > device.memory_gib * GIB else " of"
        of = f"{than} the {device.memory_gib:.0f} GiB that {device.name} has"
    unknown = "" if plan.accepted else "What has no kernel is counted as if a fast one ran."
    return [
        tag("p", tag("strong", f"{estimated.total / GIB:.2f} GiB"), f"{of}, without pipeline or shards. {unknown}"),
        _bars(("weights, gradients, optimizer", "activations", "other"), rows, _bytes),
    ]


def _bars(
    columns: tuple[str, ...], rows: Sequence[tuple[str, tuple[float, ...]]], form: Callable[[float], str]
) -> Html:
    """A table of families with a stacked bar each: its parts' widths are shares of the largest row."""
    most = max(sum(numbers) for _, numbers in rows) or 1
    classes = [f"part part-{number}" for number in range(1, len(columns) + 1)]

    def cells(numbers: Iterable[float]) -> list[Html]:
        return [tag("td", tag("data", form(number) if number else "–", value=repr(number))) for number in numbers]

    def row(family: str, numbers: tuple[float, ...]) -> Html:
        parts = (
            tag("span", class_=name, style=f"width:{100 * number / most:.4f}%")
            for name, number in zip(classes, numbers, strict=True)
            if number
        )
        bar = tag("span", *parts, class_="bar", aria_hidden="true")
        return tag(
            "tr",
            tag("th", NAMES.get(family, family), bar, scope="row"),
            *cells((*numbers, sum(numbers))),
            class_=family,
        )

    named = (
        tag("th", tag("span", class_=f"key {name}"), " ", text, scope="col") for name, text in zip(classes, columns)
    )
    total = [sum(numbers) for numbers in zip(*(numbers for _, numbers in rows), strict=True)]
    return tag(
        "table",
        tag("thead", tag("tr", tag("th", "family", scope="col"), *named, tag("th", "all", scope="col"))),
        tag("tbody", *(row(family, numbers) for family, numbers in rows)),
        tag("tfoot", tag("tr", tag("th", "whole model", scope="row"), *cells((*total, sum(total))))),
        class_="bars",
    )


def _bytes(number: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 1000 * unit else f"{number / unit:.0f} {name}"
    return f"{number:.0f} B"


def _kernels(plan: Plan) -> list[Html]:
    """Parts that are alike together: every operator with its kernel, and why."""
    shown = []
    for number, (heading, members, reasons) in enumerate(groups(plan), 1):
        kernels = members[0].part.kernels
        rows = (
            tag(
                "div",
                tag("dt", tag("code", operator)),
                tag("dd", tag("strong", kernels.get(operator, "✕ refused"))),
                tag("dd", reason),
            )
            for operator, reason in reasons.items()
        )
        shown.append(tag("section", tag("h3", heading), tag("dl", *rows, class_="kernels"), id=f"kernels-{number}"))
    return shown


CSS = """
:root { --page: #fff; --ink: #1b1b1f; --soft: #55555e; --rule: #d5d5dc; --hatch: rgb(0 0 0 / .11); --bad: #a30d0d;
  --good: #17692f; font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); }
.attention { --tint: #cfe2ff; --edge: #2f6fdb } .moe { --tint: #ffe3c2; --edge: #b35c00 }
.mamba { --tint: #cdeed3; --edge: #1f7a3a } .m2rnn { --tint: #ead6f7; --edge: #7a3aa8 }
.mtp { --tint: #d0eef3; --edge: #0f6f80 } .head { --tint: #e6e6ea; --edge: #5a5a66 }
.embedding { --tint: #f3e3d8; --edge: #8a5a3a } .norm { --tint: #eeeee0; --edge: #77733a }
.logits, .workspace, .runtime { --tint: #e6e6ea; --edge: #5a5a66 }
@media (prefers-color-scheme: dark) {
  :root { --page: #16161a; --ink: #f0f0f3; --soft: #b4b4be; --rule: #3b3b44; --hatch: rgb(255 255 255 / .13);
    --bad: #ff9d9d; --good: #86e0a0; }
  .attention { --tint: #17335f; --edge: #7fb0ff } .moe { --tint: #4d2f0c; --edge: #ffb566 }
  .mamba { --tint: #14401f; --edge: #7ddc93 } .m2rnn { --tint: #3f2256; --edge: #d39cf5 }
  .mtp { --tint: #0f3d45; --edge: #6fd5e6 }
  .head, .logits, .workspace, .runtime { --tint: #35353d; --edge: #b8b8c4 }
  .embedding { --tint: #46301f; --edge: #e0b08a } .norm { --tint: #3a3920; --edge: #d8d38a }
}
* { box-sizing: border-box }
body { margin: 0 }
main { max-width: 72rem; margin: 0 auto; padding: 1rem }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem } h3 { font-size: .95rem; margin: 1rem 0 .3rem }
p, li, dd, code { overflow-wrap: anywhere }
ol, dl, dd, .legend, .refusals { margin: 0; padding: 0; list-style: none }
.accepted { color: var(--good) } h1 .refused, .mark { color: var(--bad) }
dt { color: var(--soft) }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem }
.facts dt { font-size: .8rem }
.row { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px; margin-bottom: 4px }
.slot { position: relative }
.slot > a, .swatch { background-color: var(--tint); border: 2px solid var(--edge); border-radius: 4px; color: var(--ink) }
.slot > a { position: relative; display: flex; flex-direction: column; align-items: center; padding: .3rem 0;
  text-decoration: none; line-height: 1.2 }
.slot.sparse > a, .swatch.sparse { border-style: dashed }
.slot.refused > a, .swatch.refused {
  background-image: repeating-linear-gradient(45deg, transparent 0 5px, var(--hatch) 5px 8px) }
.symbol { font: 700 1.15rem/1.2 ui-monospace, monospace }
.role, .number { font-size: .72rem } .number { min-height: 1.2em }
.mark { position: absolute; top: 0; right: 2px; font-size: .75rem; font-weight: 700 }
a:focus-visible { outline: 3px solid var(--ink); outline-offset: 1px }
.about { visibility: hidden; position: absolute; z-index: 1; top: 100%; left: 0; width: 30rem; max-width: 80vw;
  padding: .6rem .8rem; background: var(--page); border: 2px solid var(--edge); border-radius: 4px; font-size: .82rem;
  box-shadow: 0 4px 16px rgb(0 0 0 / .35) }
.right .about { left: auto; right: 0 }
.about div { display: grid; grid-template-columns: 10.5rem 1fr; gap: .6rem } .about dt { overflow-wrap: anywhere }
.slot:hover .about, .slot:focus-within .about { visibility: visible }
main:has(.slot:hover) .slot:not(:hover) .about { visibility: hidden }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin-top: 1rem; font-size: .85rem }
.swatch { display: inline-block; min-width: 2.6rem; padding: 0 .3rem; text-align: center; font-size: .72rem }
.bars { width: 100%; border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
.bars th, .bars td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: bottom }
.bars th:first-child { text-align: left; width: 45% }
.bars td { white-space: nowrap }
.bars thead th { font-weight: 400; color: var(--soft) }
.bars tfoot * { font-weight: 700 }
.bar { display: flex; height: .8rem; margin-top: .15rem }
.part { background-color: var(--edge, var(--soft)); flex: none }
.part-2 { background: repeating-linear-gradient(45deg, var(--edge, var(--soft)) 0 3px, var(--tint, var(--rule)) 3px 6px) }
.part-3 { background: var(--tint, var(--page)); border: 2px solid var(--edge, var(--soft)) }
.key { display: inline-block; width: .9rem; height: .8rem; vertical-align: middle }
.kernels div { display: grid; grid-template-columns: 15rem 6rem 1fr; gap: 0 .8rem; border-bottom: 1px solid var(--rule);
  padding: .2rem 0; font-size: .85rem }
section:target h3 { text-decoration: underline; text-underline-offset: .2em }
.refusals ul { margin: 0; padding-left: 1.2rem; font-size: .85rem }
@media (max-width: 700px) {
  main { padding: .6rem } .row { gap: 2px; margin-bottom: 2px }
  .slot > a { border-width: 1px } .symbol { font-size: 1rem } .role, .number { font-size: .62rem } .mark { right: 0 }
  .about, .right .about { position: fixed; top: auto; left: .5rem; right: .5rem; bottom: .5rem; width: auto;
    max-width: none; max-height: 60vh; overflow: auto }
  .kernels div { grid-template-columns: 1fr auto } .kernels dd + dd { grid-column: 1 / -1 }
  .bars { font-size: .75rem } .bars th, .bars td { padding: .3rem .2rem } .bars th:first-child { width: 30% }
}
@media print {
  .about { display: none } .slot, .swatch, .bar, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .row, tr, .refusals li, section section { break-inside: avoid } main { max-width: none }
  tfoot { display: table-row-group }
}
"""
