"""A translation as text that reads at 80 columns without colour: slots by role, seams, faults, flags and notes."""

from __future__ import annotations

from collections.abc import Iterator

from nam56r.report.table import wrap
from nam56r.translate import MegatronArgs, TranslatedSlot, TranslationPlan

SEAM = {"moe": "[seam: experts ours]", "mamba3": "[seam: block ours]", "m2rnn": "[seam: symbol and block ours]"}


def render(plan: TranslationPlan, bundle: MegatronArgs | None, width: int = 80) -> str:
    """A translation and its flags, None where it is refused; width in columns."""
    lines = [_verdict(plan), _counts(plan), ""]
    lines += _folded("source   ", plan.source_pattern, width)
    lines += _folded("native   ", plan.native_pattern, width)
    lines.append(wrap(f"spec     {plan.stack_spec or "Megatron's own"}", width, 9))
    lines += ["", *_slots(plan, width), ""]
    served = (
        plan.issues if plan.accepted else [issue for issue in plan.issues if issue.kind == "seam" and not plan.strict]
    )
    lines += [wrap(f"seam: {issue.text}", width, 6) for issue in served]
    for refusal in plan.refusals:
        at = f"layer {refusal.layer}" if isinstance(refusal.layer, int) else refusal.layer
        lines.append(wrap(f"refused: {refusal.operator} ({at}): {'; '.join(refusal.reasons)}", width, 9))
    texts = {issue.text for issue in plan.issues}
    lines += [wrap(f"note: {note}", width, 6) for note in plan.custom_notes if note not in texts]
    if bundle:
        lines += ["", "flags", *_flags(bundle, width)]
    return "\n".join(lines)


def _verdict(plan: TranslationPlan) -> str:
    if not plan.accepted:
        return f"{plan.recipe}: refused, {len(plan.refusals)} reason{'s' * (len(plan.refusals) > 1)}"
    seams = len(plan.issues)
    return f"{plan.recipe}: accepted, {f'{seams} seam' + 's' * (seams > 1) if seams else 'fully native'}"


def _counts(plan: TranslationPlan) -> str:
    sparse = len(plan.layers("dsa"))
    blocks = (
        f"{count} {symbol}" + (f" ({sparse} sparse)" if symbol == "A" and sparse else "")
        for symbol, count in plan.counts.items()
    )
    return f"{len(plan.slots)} layers: {', '.join(blocks)}; {plan.mtp_suffix.count('/')} MTP"


def _slots(plan: TranslationPlan, width: int) -> Iterator[str]:
    """One line a role, in the order that the roles appear."""
    alike: dict[str, list[TranslatedSlot]] = {}
    for slot in plan.slots:
        alike.setdefault(slot.role, []).append(slot)
    for role, slots in sorted(alike.items(), key=lambda item: (item[1][0].symbol, item[1][0].layer)):
        first, numbers = slots[0], " ".join(str(slot.layer) for slot in slots)
        seam = "  " + SEAM[role] if role in SEAM else ""
        start = f"{first.symbol} {role:<7}→ {first.native}  layer{'s' * (len(slots) > 1)} "
        yield wrap(start + numbers + seam, width, len(start))
    if plan.mtp_suffix:
        yield f"MTP      → {plan.mtp_suffix}"


def _flags(bundle: MegatronArgs, width: int) -> Iterator[str]:
    """A flag a line; a value that doesn't fit goes under its flag."""
    for name, *values in bundle.flags:
        line = " ".join(["  " + name, *values])
        if len(line) <= width:
            yield line
        else:
            yield f"  {name}"
            yield from _folded("      ", " ".join(values), width)


def _folded(start: str, text: str, width: int) -> Iterator[str]:
    """Text without blanks in lines of width columns, all but the first indented as far as `start`."""
    room = max(width - len(start), 8)
    for at in range(0, len(text), room):
        yield (start if at == 0 else " " * len(start)) + text[at : at + room]
