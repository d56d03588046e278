"""The plan: which kernel runs every operator of every slot, decided once, before anything is built.

`make_plan` gives a complete plan or raises `PlanRefused` with every refusal at once. A module is built from its slot's
choice; nothing decides again at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nam56r import flops
from nam56r.features import global_features
from nam56r.kernels.registry import FAMILY, Device, NoKernel, Problem, Spec, candidates, select
from nam56r.problems import ATTENTION, Arguments, Workload, forms
from nam56r.recipe import Recipe, Role
from nam56r.records import Frozen, load_json
from nam56r.translate import Refusal, together, translate
from nam56r.translate.contract import named

DENSE = ("mla", "mtp")  # roles with dense attention
MEGATRON = "megatron"  # the vocabulary-parallel cross entropy, which isn't ours


class Part(Frozen):
    """What runs in one part of the model: kernels and shapes by operator, FLOPs a token ("forward", "backward").

    reasons has, by operator, why its kernel: what those before it lack, or that it was asked for. Dense attention has
    one of two operators, `latent_attention` (absorbed) or `mla_attention` (expanded), and there also why this form.
    """

    kernels: dict[str, str]
    reasons: dict[str, str] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]]
    flops_per_token: dict[str, float]


class Slot(Part):
    """One layer. seams has its symbol where Megatron needs custom code for it."""

    layer: int
    symbol: str
    role: Role
    seams: tuple[str, ...]
    features: tuple[str, ...]


class Plan(Frozen):
    """A recipe on a device. mtp has one part for each prediction depth, its pass through the head included."""

    recipe: str
    device: str
    dtype: str
    micro_batch: int
    tensor_parallel: int
    accepted: bool
    counts: dict[str, int]
    native_pattern: str
    features: tuple[str, ...]
    flops_per_token: dict[str, float]
    slots: tuple[Slot, ...]
    mtp: tuple[Part, ...]
    head: Part
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for `json.dumps`."""
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises ValueError when it is no plan."""
        return load_json(cls, path, "no plan")


class PlanRefused(ValueError):
    """A plan with slots that nothing can run; `plan` has what was chosen and `refusals` everything that wasn't."""

    def __init__(self, plan: Plan):
        self.plan, self.refusals = plan, plan.refusals
        where = together(plan.refusals).items()
        lines = [f"  {operator} at {', '.join(at)}: {'; '.join(why)}" for (operator, why), at in where]
        super().__init__("\n".join([f"{plan.recipe} on {plan.device} is refused:", *lines]))


def make_plan(
    recipe: Recipe,
    device: Device,
    *,
    kernels: Mapping[str, str] = {},
    micro_batch: int = 1,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Choose a kernel for every operator of every slot, of each MTP depth and of the head.

    device           from `registry.DEVICES` or `Device.of`; it need not be present
    kernels          operator -> the name of the kernel that must run it, such as {"m2rnn": "reference"}
    micro_batch      sequences of recipe.seq_length in one pass
    tensor_parallel  ranks that heads and the vocabulary are split over
    dtype            of activations and linears
    Raises PlanRefused with all refusals, ValueError for an operator or a kernel that doesn't exist.
    """
    for name, value in (("micro_batch", micro_batch), ("tensor_parallel", tensor_parallel)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a whole number from 1")
    for operator, name in kernels.items():
        known = [kernel.name for kernel in candidates(operator)]
        if name not in known:
            raise ValueError(f"{operator} has no kernel {name!r}: one of {', '.join(known)}")

    translation = translate(recipe)
    chooser = _Chooser(Workload(recipe, micro_batch, tensor_parallel, dtype), device, dict(kernels))
    slots = []
    for slot in translation.slots:
        part = chooser.part(slot.role, slot.layer, flops.layer(recipe, slot.layer))
        slots.append(
            Slot(
                layer=slot.layer,
                symbol=slot.symbol,
                role=slot.role,
                seams=slot.seams,
                features=slot.features,
                **dict(part),
            )
        )
    depths = range(1, recipe.mtp.num_depths + 1)
    mtp = tuple(chooser.part("mtp", f"mtp {depth}", flops.mtp(recipe)) for depth in depths)
    head = chooser.part("head", "head", flops.head(recipe))
    notes = [*translation.custom_notes, *_index_sharing(recipe)]
    if tensor_parallel > 1:
        notes.append("linear_cross_entropy: the vocabulary is split, so Megatron's vocabulary-parallel loss runs")
        if "R" in recipe.layers.layers:
            notes.append("R is replicated on every tensor-parallel rank")
    refusals = (*translation.refusals, *chooser.refusals)
    plan = Plan(
        recipe=recipe.name,
        device=device.name,
        dtype=str(dtype).removeprefix("torch."),
        micro_batch=micro_batch,
        tensor_parallel=tensor_parallel,
        accepted=not refusals,
        counts=translation.counts,
        native_pattern=translation.native_pattern,
        features=global_features(recipe),
        flops_per_token=vars(flops.model(recipe)),
        slots=tuple(slots),
        mtp=mtp,
        head=head,
        notes=tuple(notes),
        refusals=refusals,
    )
    if refusals:
        raise PlanRefused(plan)
    return plan


def kernels_named(settings: Iterable[str]) -> dict[str, str]:
    """["operator=name", …] as a mapping. Raises ValueError for an unknown operator or a missing =."""
    chosen = {}
    for setting in settings:
        operator, _, name = setting.partition("=")
        if not name:
            raise ValueError(f"--kernel is {setting!r}, but must be operator=name, such as m2rnn=reference")
        if operator not in FAMILY:
            raise ValueError(f"--kernel names the operator {operator!r}, but must name one of {', '.join(FAMILY)}")
        chosen[operator] = name
    return chosen


def _index_sharing(recipe: Recipe) -> Iterator[str]:
    """Whose indices the sparse layers use, where some use another's."""
    if recipe.shares_indices:
        sources = recipe.index_sources.items()
        users = {own: [str(layer) for layer, of in sources if of == own != layer] for own in recipe.indexer_layers}
        shared = "; ".join(f"{own} for {', '.join(by)}" for own, by in users.items() if by)
        yield f"dsa: {named(recipe.indexer_layers)} compute indices, and the sparse layers between use them: {shared}"


def _without_module(recipe: Recipe, role: str) -> dict[str, str]:
    """Why a slot can't be built though its operators have kernels, by operator: what the modules around them lack."""
    theta = recipe.mla.rope_theta
    if role in DENSE and not theta > 1:
        return {"mla_queries": f"mla.rope_theta is {theta:g}, but the rotation's frequencies must fall: set it above 1"}
    return {}


class _Chooser:
    """Asks the registry part by part and keeps every refusal."""

    def __init__(self, work: Workload, device: Device, names: dict[str, str]):
        self.work, self.device, self.names = work, device, names
        self.refusals: list[Refusal] = []

    def part(self, role: str, layer: int | str, counted: flops.Flops) -> Part:
        form, why_form, faults = self._form() if role in DENSE else (None, "", {})
        for operator, reason in self.work.indivisible(role, form=form):
            faults.setdefault(operator, []).append(reason)
        indexer = layer in self.work.recipe.indexer_layers
        asked = self.work.operators(role, indexer=indexer, form=form)
        chosen, why_chosen = {}, {}
        for operator, arguments in asked.items():
            if operator in faults:
                continue
            if operator == "linear_cross_entropy" and self.work.tensor_parallel > 1:
                if operator in self.names:
                    wanted = f"{operator}={self.names[operator]}"
                    faults[operator] = [
                        f"{wanted} is asked for by name, but tp > 1 splits the vocabulary and Megatron's own runs: "
                        "leave the name out, or take tp = 1"
                    ]
                    continue
                chosen[operator], why_chosen[operator] = MEGATRON, "the vocabulary is split over ranks"
                continue
            if refused := self._refused(operator, arguments):
                faults[operator] = refused
                continue
            problem = Problem.of(operator, self.device, **arguments)
            chosen[operator] = select(problem, self.names.get(operator)).name
            why_chosen[operator] = _why(problem, chosen[operator], asked_for=operator in self.names)
            if form is not None and operator == ATTENTION[form]:
                why_chosen[operator] = f"{why_form}; {why_chosen[operator]}"
        for operator, reason in _without_module(self.work.recipe, role).items():
            faults.setdefault(operator, []).append(reason)
            chosen.pop(operator, None)
            why_chosen.pop(operator, None)
        for operator, reasons in faults.items():
            self.refusals.append(Refusal(layer=layer, operator=operator, reasons=tuple(reasons)))
        shapes = {
            operator: {name: value.shape for name, value in arguments.items() if isinstance(value, Spec)}
            for operator, arguments in asked.items()
        }
        return Part(kernels=chosen, reasons=why_chosen, shapes=shapes, flops_per_token=vars(counted))

    def _refused(self, operator: str, arguments: Arguments) -> list[str]:
        """Every candidate's reasons where none takes it."""
        try:
            select(Problem.of(operator, self.device, **arguments), self.names.get(operator))
        except NoKernel as none:
            return [f"{name}: {', '.join(why)}" for name, why in none.reasons.items()]
        return []

    def _form(self) -> tuple[str, str, dict[str, list[str]]]:
        """The form of dense attention, why, and by operator what refuses it: the better one that has kernels, or is named.

        Both are refused together, under an operator of the better one.
        """
        better, other = forms(self.work.recipe.mla)
        named = [form for form in (better, other) if ATTENTION[form] in self.names]
        if len(named) == 2:
            both = " and ".join(f"{ATTENTION[form]}={self.names[ATTENTION[form]]}" for form in sorted(named))
            fault = f"{both} are asked for by name, but a layer has one form: name one"
            return better, "", {ATTENTION[better]: [fault]}
        if named:
            return named[0], f"{named[0]}, as named", {}
        score, stored = flops.mla_score(self.work.recipe.mla), self.work.expanded_bytes() / 2**20
        absorbed, expanded = (f"{form}: {score[form]} FLOPs a score" for form in ("absorbed", "expanded"))
        why = {
            "absorbed": f"{absorbed}, expanded {score['expanded']} and {stored:.1f} MiB of K and V",
            "expanded": f"{expanded}, absorbed {score['absorbed']}; K and V take {stored:.1f} MiB",
        }
        refused = {form: self._form_refused(form) for form in (better, other)}
        if not refused[better]:
            return better, why[better], {}
        listed = {
            form: "; ".join(f"{op} {why}" for op, all_of in by.items() for why in all_of)
            for form, by in refused.items()
        }
        if not refused[other]:
            return other, f"{why[other]}; {better} has no kernel ({listed[better]})", {}
        at, own = next(iter(refused[better].items()))
        return better, "", {at: [*own, f"{other}: {listed[other]}"]}

    def _form_refused(self, form: str) -> dict[str, list[str]]:
        """Reasons by operator of what is of this form alone and has no kernel."""
        asked = self.work.operators("mla", form=form)
        found = {op: self._refused(op, asked[op]) for op in (ATTENTION[form], "mla_queries")}
        return {operator: reasons for operator, reasons in found.items() if reasons}


def _why(problem: Problem, chosen: str, *, asked_for: bool) -> str:
    """Why the chosen kernel: asked for by name, or what each one before it lacks."""
    if asked_for:
        return "asked for by name"
    kernels = candidates(problem.operator)
    before = takewhile(lambda kernel: kernel.name != chosen, kernels)
    lacking = [f"{kernel.name}: {', '.join(kernel.reasons(problem, by_name=False))}" for kernel in before]
    return "; ".join(lacking) or ("first choice" if len(kernels) > 1 else "the only kernel so far")
