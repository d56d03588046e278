"""The plan of a translation: every slot with its native symbol, the seams and the faults.

A lowers to `+` (dense MLA) or `D` (DSA), E to `E`, M to `M`; MTP is a suffix. R has no symbol and stays `R`. A *seam* is
a part whose symbol Megatron may know, but whose mathematics is ours; a *fault* is what neither can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from nam56r import features
from nam56r.pattern import Pattern, parse
from nam56r.recipe import Recipe, Role
from nam56r.records import Frozen, shown

NATIVE = {"mla": "+", "dsa": "D", "moe": "E", "mamba3": "M", "mamba2": "M"}
VISIBLE = NATIVE | {"m2rnn": "R"}
MTP_DEPTH = "+-"
STACK_SPEC = "nam56r.megatron.specs nam56r_stack_spec"


class _Seam(NamedTuple):
    """What Megatron lacks, and how to author a recipe without it."""

    text: str
    remedy: str


SEAMS: dict[str, _Seam] = {
    "moe": _Seam(
        "E's routed experts are relu² beside SwiGLU MLPs: Megatron's --squared-relu and --swiglu are for the whole model "
        "and exclude each other, so the experts are ours",
        "leave E out of the pattern",
    ),
    "mamba3": _Seam("M is Mamba-3: Megatron's own M is Mamba-2, so the block is ours", "set mamba.kind to mamba2"),
    "m2rnn": _Seam(
        "R is M²RNN: Megatron has no symbol for it, so the symbol and the block are ours", "leave R out of the pattern"
    ),
}
SEAM_SYMBOLS = ("mamba3", "m2rnn")  # roles whose symbol itself is a seam: E means a mixture of experts in Megatron too


class TranslatedSlot(Frozen):
    """One layer: its number, rank in its family (from 0), authored symbol, role, and native symbol (R stays R).

    seams has its symbol where Megatron means another block by it, or none.
    """

    layer: int
    rank: int
    symbol: str
    role: Role
    native: str
    seams: tuple[str, ...]
    features: tuple[str, ...]


class Issue(Frozen):
    """What keeps a recipe from being native: a seam, which our stack spec serves, or a fault, which nothing does."""

    layer: int | Literal["model"]
    subject: str
    kind: Literal["seam", "fault"]
    text: str


class Refusal(Frozen):
    """Why a recipe can't be built: where (a layer's number, "head", "mtp 1", "model"), which operator or feature."""

    layer: int | str
    operator: str
    reasons: tuple[str, ...]


def together(refusals: Iterable[Refusal]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Where each operator is refused for the same reasons: (operator, reasons) -> places, in order."""
    where: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for refusal in refusals:
        where.setdefault((refusal.operator, refusal.reasons), []).append(str(refusal.layer))
    return where


class TranslationPlan(Frozen):
    """A recipe beside what it lowers to. JSON in and out through pydantic.

    source_pattern  as authored, before tiling
    native_pattern  what `--hybrid-layer-pattern` takes: tiled, with stages and MTP; R is still R
    custom_notes    one for each seam and each feature that no flag can say, with layers and values
    stack_spec      what `--spec` must name to serve the seams, or None: Megatron's own spec does
    """

    recipe: str
    source_pattern: str
    slots: tuple[TranslatedSlot, ...]
    counts: dict[str, int]
    native_pattern: str
    mtp_suffix: str
    custom_notes: tuple[str, ...]
    issues: tuple[Issue, ...]
    stack_spec: str | None
    strict: bool

    @property
    def requires_custom_mamba3(self) -> bool:
        return self._has("mamba3")

    @property
    def requires_custom_m2rnn(self) -> bool:
        return self._has("m2rnn")

    @property
    def requires_custom_experts(self) -> bool:
        return self._has("moe")

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every fault, and in a strict plan every seam."""
        return tuple(
            Refusal(layer=issue.layer, operator=issue.subject, reasons=(self._reason(issue),))
            for issue in self.issues
            if issue.kind == "fault" or self.strict
        )

    @property
    def accepted(self) -> bool:
        return not self.refusals

    @property
    def fully_native(self) -> bool:
        """No seam and no issue is left."""
        return not self.issues and not any(slot.seams for slot in self.slots)

    def to_json(self) -> dict[str, Any]:
        """As plain data with what follows from it, for `json.dumps`."""
        derived = (
            "requires_custom_mamba3",
            "requires_custom_m2rnn",
            "requires_custom_experts",
            "accepted",
            "fully_native",
        )
        refusals = [refusal.model_dump(mode="json") for refusal in self.refusals]
        return self.model_dump(mode="json") | {name: getattr(self, name) for name in derived} | {"refusals": refusals}

    def layers(self, *roles: str) -> tuple[int, ...]:
        """The numbers of the layers with one of these roles."""
        return tuple(slot.layer for slot in self.slots if slot.role in roles)

    def _has(self, role: str) -> bool:
        return any(slot.role == role for slot in self.slots)

    @staticmethod
    def _reason(issue: Issue) -> str:
        if issue.kind == "fault":
            return issue.text
        return f"{issue.text}; strict refuses every seam: {SEAMS[issue.subject].remedy}, or translate without strict"


class TranslationRefused(ValueError):
    """A translation with faults, or a strict one with seams; `refusals` has all of them."""

    def __init__(self, translation: TranslationPlan):
        self.translation, self.refusals = translation, translation.refusals
        lines = [f"  {r.operator} at {r.layer}: {'; '.join(r.reasons)}" for r in self.refusals]
        super().__init__("\n".join([f"the translation of {translation.recipe} is refused:", *lines]))


def translate(recipe: Recipe, *, strict: bool = False, layout: str | None = None) -> TranslationPlan:
    """Expand a recipe slot by slot.

    strict  refuses every seam, where they are otherwise served by `stack_spec` and listed in the notes
    layout  the whole pattern with `|` between pipeline stages, in place of the recipe's own
    Faults and strict's seams are in `refusals`, all of them. Raises ValueError for a layout of other layers only.
    """
    pattern = recipe.layers if layout is None else _laid_out(recipe, layout)
    slots = tuple(
        TranslatedSlot(
            layer=number,
            rank=pattern.rank(number),
            symbol=symbol,
            role=role,
            native=VISIBLE[role],
            seams=(symbol,) if role in SEAM_SYMBOLS else (),
            features=features.on_layer(recipe, number),
        )
        for number, (symbol, role) in enumerate(zip(pattern.layers, recipe.roles, strict=True), 1)
    )
    suffix = f"/{MTP_DEPTH}" * recipe.mtp.num_depths
    layers: dict[str, list[int]] = {}
    for slot in slots:
        layers.setdefault(slot.role, []).append(slot.layer)
    seams = tuple(
        Issue(layer="model", subject=role, kind="seam", text=f"{seam.text} ({named(layers[role])})")
        for role, seam in SEAMS.items()
        if role in layers
    )
    return TranslationPlan(
        recipe=recipe.name,
        source_pattern=recipe.pattern,
        slots=slots,
        counts=pattern.counts,
        native_pattern=_divided(pattern, "".join(slot.native for slot in slots)) + suffix,
        mtp_suffix=suffix,
        custom_notes=(*(seam.text for seam in seams), *_without_flag(recipe, layers)),
        issues=(*seams, *_faults(recipe, layers)),
        stack_spec=STACK_SPEC if seams else None,
        strict=strict,
    )


def named(layers: Iterable[int]) -> str:
    """ "layer 12" or "layers 12, 24"."""
    numbers = [str(layer) for layer in layers]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def _laid_out(recipe: Recipe, layout: str) -> Pattern:
    """A layout as the recipe's pattern. Its MTP suffix may be left out."""
    pattern, own = parse(layout), recipe.layers
    if pattern.layers != own.layers:
        if len(pattern.layers) != len(own.layers):
            fault = f"spells {len(pattern.layers)} layers, but the recipe has {len(own.layers)}"
        else:
            pairs = enumerate(zip(pattern.layers, own.layers, strict=True), 1)
            number, (here, there) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
            fault = f"has {here} at layer {number}, but the recipe has {there}"
        raise ValueError(f"layout {shown(layout)} {fault}: write out {own.layers} with | between stages")
    if pattern.mtp_depths and (pattern.mtp, pattern.mtp_depths) != (MTP_DEPTH, recipe.mtp.num_depths):
        wanted = f"/{MTP_DEPTH}" * recipe.mtp.num_depths or "no suffix"
        raise ValueError(
            f"layout {shown(layout)}: its MTP suffix must be {wanted}, as mtp.num_depths says, or be left out"
        )
    return pattern


def _divided(pattern: Pattern, symbols: str) -> str:
    """Symbols with the pattern's stage boundaries."""
    rest = iter(symbols)
    return "|".join("".join(next(rest) for _ in segment) for segment in pattern.segments)


def _faults(recipe: Recipe, layers: dict[str, list[int]]) -> Iterator[Issue]:
    """What neither Megatron nor our stack spec can do."""

    def fault(subject: str, text: str, layer: int | Literal["model"] = "model") -> Issue:
        return Issue(layer=layer, subject=subject, kind="fault", text=text)

    for wrong in features.misplaced(recipe):
        yield fault(wrong.feature, wrong.reason, "model" if wrong.layer is None else wrong.layer)
    if not recipe.moe.num_experts and "moe" in layers:
        yield fault(
            "moe",
            f"moe.num_experts = 0 is MoE off, but {named(layers['moe'])} {_are(layers['moe'])} E, which lowers to E only "
            "with MoE on: set moe.num_experts to at least moe.top_k, or leave E out of the pattern",
        )
    theta = recipe.mla.rope_theta
    if has_attention(recipe) and not theta.is_integer():
        yield fault(
            "mla",
            f"mla.rope_theta = {theta}, but Megatron's --rotary-base takes whole numbers: set it to {max(round(theta), 1)}",
        )
    if recipe.shares_indices and index_sharing(recipe) is None:
        yield fault(
            "dsa",
            f"dsa.share_every = {recipe.dsa.share_every} counts sparse slots, but Megatron's --dsa-indexer-topk-freq counts "
            f"layer numbers, and no offset and frequency give indices to {named(recipe.indexer_layers)} alone of the sparse "
            f"{named(recipe.sparse_layers)}: set dsa.share_every to 1, or space dsa.ranks evenly",
        )


def _without_flag(recipe: Recipe, layers: dict[str, list[int]]) -> Iterator[str]:
    """Values and features that are in no flag, beside the seams themselves."""
    if "mamba3" in layers:
        # SISO is said too: a reader must not take a missing note for a default
        yield f"mimo: mamba.mimo_rank = {recipe.mamba.mimo_rank} has no flag ({named(layers['mamba3'])})"
    if "mamba2" in layers and any(role in layers for role in SEAMS):
        yield (
            f"mamba2: mamba.kind = mamba2 has no flag, and the stack spec's M takes it from the recipe; the block is "
            f"Megatron's own ({named(layers['mamba2'])})"
        )
    if "m2rnn" in layers:
        sizes = ", ".join(f"m2rnn.{name} = {value}" for name, value in recipe.m2rnn)
        yield f"m2rnn: {sizes} have no flag ({named(layers['m2rnn'])})"
    if "dsa" in layers:
        dense = ([named(layers["mla"])] if "mla" in layers else []) + ["MTP"] * bool(recipe.mtp.num_depths)
        if dense:
            yield (
                "dsa: a D in the pattern makes Megatron set experimental_attention_variant = dsa for the whole model; "
                "+ stays dense, but under Megatron's own stack spec the norms of its q and kv are then modules of their own, "
                f"not fused into the projections ({', '.join(dense)})"
            )


def has_attention(recipe: Recipe) -> bool:
    """Whether any part of the model is MLA: an A slot or a depth of MTP."""
    return "A" in recipe.layers.layers or recipe.mtp.num_depths > 0


def index_sharing(recipe: Recipe) -> tuple[int, int] | None:
    """The recipe's index sharing as Megatron's (offset, frequency) over layer numbers, or None where there is none.

    Megatron lets layer n compute indices where (n - offset) % frequency is 0, and reuse the last such layer's elsewhere.
    """
    offset = recipe.sparse_layers[0]
    for frequency in range(recipe.depth, 0, -1):
        if all(layer - (layer - offset) % frequency == source for layer, source in recipe.index_sources.items()):
            return offset, frequency
    return None


def _are(layers: list[int]) -> str:
    return "are" if len(layers) > 1 else "is"
