"""What the checks of a launch look at, worked out once, and the record that each of them gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch

from nam56r import memory
from nam56r.kernels.registry import DEVICES, FAMILY, Device, candidates
from nam56r.launch.options import RunOptions
from nam56r.launch.profile import LauncherProfile
from nam56r.pattern import Pattern, parse
from nam56r.plan import Part, Plan, PlanRefused, make_plan
from nam56r.problems import Workload
from nam56r.recipe import Recipe
from nam56r.records import Frozen
from nam56r.translate import Refusal, TranslationPlan, translate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARGUMENTS = "megatron/training/arguments.py"
CONFIG = "megatron/core/transformer/transformer_config.py"


class Check(Frozen):
    """One rule: what the launch has, what the rule is and, where it is broken, what would satisfy it."""

    name: str
    passed: bool
    value: str
    rule: str
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """What is asked for, and everything the checks ask of it, worked out once.

    here  the launch is to run on this machine now: its devices, the data and the run's folder must be there
    """

    recipe: Recipe
    profile: LauncherProfile
    run: RunOptions
    strict: bool = False
    here: bool = False

    @cached_property
    def device(self) -> Device:
        return DEVICES[self.profile.device]

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.profile.precision]

    @property
    def wanted_segments(self) -> int:
        return self.profile.pp * self.profile.vpp

    @cached_property
    def pattern(self) -> Pattern:
        """The recipe's layers in segments: the profile's layout where it is one of these layers, or an even split."""
        own = self.recipe.layers
        if self.layout_fault is None and self.profile.layout is not None:
            return parse(self.profile.layout)
        if self.profile.layout is None and len(own.segments) == 1 and not self.recipe.depth % self.wanted_segments:
            size = self.recipe.depth // self.wanted_segments
            return Pattern(tuple(own.layers[i : i + size] for i in range(0, self.recipe.depth, size)))
        return own

    @cached_property
    def layout_fault(self) -> str | None:
        """Why the profile's layout isn't one of the recipe's layers."""
        try:
            translate(self.recipe, layout=self.profile.layout)
        except ValueError as error:
            return str(error)
        return None

    @cached_property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """Layer numbers of each segment."""
        numbers = iter(range(1, self.recipe.depth + 1))
        return tuple(tuple(islice(numbers, len(segment))) for segment in self.pattern.segments)

    @cached_property
    def translation(self) -> TranslationPlan:
        return translate(self.recipe, strict=self.strict, layout="|".join(self.pattern.segments))

    @cached_property
    def own_translation(self) -> TranslationPlan:
        """As the plan has it: of the recipe alone, without the profile's layout and not strict."""
        return translate(self.recipe)

    @cached_property
    def data_parallel(self) -> int | None:
        """Data-parallel processes; None where the sizes don't divide the processes."""
        together = self.profile.tp * self.profile.pp * self.profile.cp
        return None if self.profile.processes % together else self.profile.processes // together

    @cached_property
    def microbatches(self) -> int | None:
        """Passes of one process in one update; None where the global batch doesn't divide."""
        if self.data_parallel is None or self.profile.global_batch % (self.profile.micro_batch * self.data_parallel):
            return None
        return self.profile.global_batch // (self.profile.micro_batch * self.data_parallel)

    @cached_property
    def unknown_kernels(self) -> tuple[str, ...]:
        """What is wrong with each operator or kernel that the profile names and that isn't there."""
        faults = []
        for operator, name in self.profile.kernels.items():
            if operator not in FAMILY:
                faults.append(f"{operator} is no operator: one of {', '.join(FAMILY)}")
            elif name not in kernel_names(operator):
                faults.append(f"{operator} has no kernel {name}: one of {', '.join(kernel_names(operator))}")
        return tuple(faults)

    def indivisible(self, tp: int) -> tuple[str, ...]:
        """Everything of the recipe that a tensor-parallel size splits and doesn't divide, the sequence included."""
        work = Workload(self.recipe, 1, tp, self.dtype)
        parts = dict.fromkeys((*self.recipe.roles, *(["mtp"] if self.recipe.mtp.num_depths else []), "head"))
        found = dict.fromkeys(reason for part in parts for _, reason in work.indivisible(part))
        # the sequence, and heads whether there is attention or not: Megatron's configuration asks every model
        always = {"mla.num_heads": self.recipe.mla.num_heads, "seq_length": self.recipe.seq_length}
        reasons = [
            f"{name} = {size} doesn't divide by tensor_parallel = {tp}" for name, size in always.items() if size % tp
        ]
        return tuple(found | dict.fromkeys(reasons))

    @cached_property
    def nearest_tp(self) -> int:
        """The profile's tp, or the next lower one that divides, so that the plan says all else at once."""
        return next(tp for tp in range(min(self.profile.tp, 1024), 0, -1) if not self.indivisible(tp))

    @cached_property
    def plan(self) -> Plan:
        """Of the recipe on the profile's device at `nearest_tp`, accepted or refused."""
        kernels = self.profile.kernels
        known = {operator: name for operator, name in kernels.items() if name in kernel_names(operator)}
        try:
            return make_plan(
                self.recipe,
                self.device,
                kernels=known,
                micro_batch=self.profile.micro_batch,
                tensor_parallel=self.nearest_tp,
                dtype=self.dtype,
            )
        except PlanRefused as refused:
            return refused.plan

    @cached_property
    def plan_refusals(self) -> tuple[Refusal, ...]:
        """Of slots that nothing can run; those of the translation are the translation's."""
        return tuple(r for r in self.plan.refusals if r not in self.own_translation.refusals)

    @property
    def parts(self) -> tuple[tuple[int | str, Part], ...]:
        """Every part of the model by the name that refusals give it."""
        plan = self.plan
        depths = ((f"mtp {depth}", part) for depth, part in enumerate(plan.mtp, 1))
        return (*((slot.layer, slot) for slot in plan.slots), *depths, ("head", plan.head))

    @cached_property
    def memory(self) -> tuple[memory.Estimate, ...]:
        """By pipeline rank; none where the sizes don't fit together."""
        p = self.profile
        if self.microbatches is None or len(self.segments) != self.wanted_segments:
            return ()
        # as many passes as a schedule ever has in flight tell the same as more
        most = 4 * self.wanted_segments
        return memory.stages(
            self.recipe,
            self.plan,
            segments=self.segments,
            pipeline=p.pp,
            expert_parallel=p.ep,
            context_parallel=p.cp,
            optimizer_shards=self.data_parallel * p.cp if p.distributed_optimizer else 1,
            microbatches=min(self.microbatches, most),
            recompute=p.recompute,
        )

    @cached_property
    def free(self) -> int | None:
        """Bytes that one process can take: of this machine where it has the device, else what the device has."""
        free = memory.available(self.device)
        return free // self.profile.gpus_per_node if self.cpu and free is not None else free


def kernel_names(operator: str, role: str | None = None) -> tuple[str, ...]:
    """The names of an operator's kernels, of one role where one is given; none for what is no operator."""
    if operator not in FAMILY:
        return ()
    return tuple(kernel.name for kernel in candidates(operator) if role in (None, kernel.role))
