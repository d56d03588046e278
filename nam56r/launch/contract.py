"""The launch contract: the recipe's flags and the operator's policy side by side, never as one string.

`generated_native_args` come from the recipe alone. `fixed_policy` is what the operator decides. Nothing here puts the two
into one sequence: the shell script that runs a launch keeps them as two arrays.
"""

from __future__ import annotations

from pathlib import Path

from nam56r.launch.checks import judge
from nam56r.launch.facts import Check, Facts
from nam56r.launch.options import RECIPE, RunOptions
from nam56r.launch.profile import NOT_INHERITED, CudaGraphs, Entry, Guards, LauncherProfile, Precision
from nam56r.recipe import Recipe
from nam56r.records import Frozen, load_json
from nam56r.translate import Refusal, megatron_args

MODULES = {"pretrain": "nam56r.megatron.pretrain", "train": "nam56r"}
# the optimizer of `nam56r train`, for Megatron's own loop to train the same
ADAM = ("--adam-beta1", "0.9", "--adam-beta2", "0.95", "--adam-eps", "1e-08")


class Parallel(Frozen):
    """Sizes; dp is what is left of the processes, None where they don't divide."""

    tp: int
    pp: int
    vpp: int
    ep: int
    cp: int
    dp: int | None


class Batch(Frozen):
    """Sequences in one pass and in one update, and passes of one process in an update (None: they don't divide)."""

    micro: int
    whole: int
    microbatches: int | None


class FixedPolicy(Frozen):
    """The operator's overlay; args are the flags that say it to the entry: Megatron's, or `nam56r train`'s.

    not_inherited   variables that the run's script takes out before it sets the environment; a * is any ending
    """

    environment: dict[str, str]
    not_inherited: tuple[str, ...]
    parallel: Parallel
    batch: Batch
    mtp_depths: int
    sparse_mode: str
    cuda_graphs: CudaGraphs
    recompute: str
    precision: Precision
    distributed_optimizer: bool
    guards: Guards
    args: tuple[str, ...]


class Processes(Frozen):
    """What torchrun starts: nproc on each of nnodes. entry_args go to the module before all others."""

    nnodes: int
    nproc: int
    rendezvous: str | None
    module: str
    entry_args: tuple[str, ...]

    @property
    def torchrun(self) -> tuple[str, ...]:
        """torchrun and its own options, up to the module."""
        meet = ("--standalone",) if self.nnodes == 1 else ("--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous)
        counts = ("--nnodes", str(self.nnodes), "--nproc-per-node", str(self.nproc))
        return ("torchrun", *(word for word in meet if word), *counts, "-m", self.module)


class RankMemory(Frozen):
    """Estimated bytes on one device of a pipeline rank; activations by family."""

    rank: int
    layers: tuple[str, ...]
    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    logits: int
    workspace: int
    runtime: int
    total: int


class PlanAcceptance(Frozen):
    """The plan on the profile's device: accepted, or what no kernel runs."""

    device: str
    dtype: str
    accepted: bool
    kernels: dict[str, tuple[str, ...]]
    refusals: tuple[Refusal, ...]


class LaunchContract(Frozen):
    """Everything a launch is, accepted or refused. JSON in and out.

    profile                 with the layout resolved: segments, R layers, DSA ranks, depth, MTP depths
    generated_native_args   Megatron's flags for the recipe, from its translation only
    fixed_policy            the operator's overlay
    run_args                data, folder, steps, learning rate, as the entry's flags
    passes_native_args      whether the entry takes the native flags; `nam56r train` takes the recipe itself
    custom_notes            what no native flag can say
    notes                   what an operator should know besides
    """

    recipe: Recipe
    profile: LauncherProfile
    run: RunOptions
    strict: bool
    entry: Entry
    processes: Processes
    generated_native_args: tuple[str, ...]
    passes_native_args: bool
    fixed_policy: FixedPolicy
    run_args: tuple[str, ...]
    custom_notes: tuple[str, ...]
    notes: tuple[str, ...]
    memory: tuple[RankMemory, ...]
    memory_available: int | None
    plan: PlanAcceptance
    checks: tuple[Check, ...]
    accepted: bool

    @property
    def refused(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LaunchContract:
        """Read what `save` wrote. Raises ValueError when it is no contract."""
        return load_json(cls, path, "no launch contract")


class LaunchRefused(ValueError):
    """A launch that some check refuses; `contract` has everything."""

    def __init__(self, contract: LaunchContract):
        self.contract = contract
        lines = [f"  {check.name}: {check.value}; {check.rule}: {check.remedy}" for check in contract.refused]
        heading = f"{contract.recipe.name} on profile {contract.profile.name} is refused:"
        super().__init__("\n".join([heading, *lines]))


def make_contract(
    recipe: Recipe, profile: LauncherProfile, run: RunOptions, *, strict: bool = False, here: bool = False
) -> LaunchContract:
    """Put recipe, profile and run together and check them as a whole.

    strict  refuses every seam of the translation
    here    the launch is to run on this machine now: its devices, the data and the run's folder are checked too
    Raises LaunchRefused, with the contract, when a check fails: every one is made first.
    """
    facts = Facts(recipe, profile, run, strict, here)
    checks = judge(facts)
    native = () if facts.translation.refusals else _native(facts)
    contract = LaunchContract(
        recipe=recipe,
        profile=_resolved(facts),
        run=run,
        strict=strict,
        entry=profile.entry,
        processes=_processes(facts),
        generated_native_args=native,
        passes_native_args=profile.entry == "pretrain",
        fixed_policy=_policy(facts),
        run_args=_pretrain_run(recipe, run) if profile.entry == "pretrain" else _train_run(run),
        custom_notes=facts.translation.custom_notes,
        notes=tuple(_notes(facts)),
        memory=_memory(facts),
        memory_available=facts.free,
        plan=_acceptance(facts),
        checks=checks,
        accepted=all(check.passed for check in checks),
    )
    if not contract.accepted:
        raise LaunchRefused(contract)
    return contract


def _native(f: Facts) -> tuple[str, ...]:
    return megatron_args(f.recipe, f.translation, dispatcher="allgather" if f.cpu else "alltoall").args


def _resolved(f: Facts) -> LauncherProfile:
    layers = f.recipe.layers
    laid_out = f.profile.layout if f.layout_fault else "|".join(f.pattern.segments)
    taken = {
        "layout": laid_out,
        "depth": f.recipe.depth,
        "r_layer_indices": layers.numbers("R"),
        "dsa_ranks": f.recipe.dsa.ranks,
        "mtp_depths": f.recipe.mtp.num_depths,
    }
    # what the operator states stays as stated: a check compares it
    stated = {name: getattr(f.profile, name) for name in taken if name != "layout"}
    return f.profile.model_copy(update=taken | {name: value for name, value in stated.items() if value is not None})


def _policy(f: Facts) -> FixedPolicy:
    p = f.profile
    return FixedPolicy(
        environment={name: value.replace("{run}", f.run.folder) for name, value in p.environment.items()},
        not_inherited=NOT_INHERITED,
        parallel=Parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, ep=p.ep, cp=p.cp, dp=f.data_parallel),
        batch=Batch(micro=p.micro_batch, whole=p.global_batch, microbatches=f.microbatches),
        mtp_depths=f.recipe.mtp.num_depths,
        sparse_mode=p.sparse_mode,
        cuda_graphs=p.cuda_graphs,
        recompute=p.recompute,
        precision=p.precision,
        distributed_optimizer=p.distributed_optimizer,
        guards=p.guards,
        args=tuple(str(word) for word in (_pretrain_policy(f) if p.entry == "pretrain" else _train_policy(f))),
    )


def _pretrain_policy(f: Facts) -> list[object]:
    """Megatron's flags for the policy. vpp has none: it follows from the pattern's segments."""
    p = f.profile
    args: list[object] = [
        *("--tensor-model-parallel-size", p.tp),
        *("--pipeline-model-parallel-size", p.pp),
        *("--context-parallel-size", p.cp),
        *("--expert-model-parallel-size", p.ep),
        *("--expert-tensor-parallel-size", 1),  # our experts are whole on each rank
        *("--micro-batch-size", p.micro_batch),
        *("--global-batch-size", p.global_batch),
        *("--cuda-graph-impl", p.cuda_graphs),
        *("--clip-grad", p.guards.clip_grad),
        "--no-gradient-accumulation-fusion",  # a kernel of Apex's or Transformer Engine's
        "--exit-signal-handler",  # SIGTERM saves
    ]
    if p.tp > 1:
        args.append("--sequence-parallel")
    if p.recompute == "full":
        args += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    if p.precision != "fp32":
        args += [f"--{p.precision}", "--accumulate-allreduce-grads-in-fp32"]
    if p.guards.loss_scale is not None:
        args += ["--loss-scale", p.guards.loss_scale]
    if not p.guards.check_nan:
        args.append("--no-check-for-nan-in-loss-and-grad")
    if p.distributed_optimizer:
        args.append("--use-distributed-optimizer")
    if f.cpu:
        args += ["--distributed-backend", "gloo", "--disable-gloo-process-groups", "--use-cpu-initialization"]
        args.append("--no-bias-dropout-fusion")
        if f.run.resume:
            args.append("--no-load-rng")  # there is no CUDA generator to set
    return args


def _train_policy(f: Facts) -> list[object]:
    p = f.profile
    return [
        *("--device", f.device.type),
        *("--tp", p.tp),
        *("--ep", p.ep),
        *("--micro-batch", p.micro_batch),
        *("--global-batch", p.global_batch),
        *("--clip-grad", p.guards.clip_grad),
    ]


def _pretrain_run(recipe: Recipe, run: RunOptions) -> tuple[str, ...]:
    checkpoints = f"{run.folder}/checkpoints"
    return (
        *("--data-path", run.prefix, "--split", "100,0,0", "--data-cache-path", f"{run.folder}/index"),
        # the data set is tokens already; the null tokenizer asks for their number
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(recipe.vocab_size)),
        # Megatron divides by the interval even where nothing is evaluated
        *("--train-iters", str(run.steps), "--eval-iters", "0", "--eval-interval", str(run.steps)),
        *("--lr", repr(run.lr), "--min-lr", repr(run.final_lr), "--lr-decay-style", "cosine"),
        *("--lr-decay-iters", str(run.steps), "--lr-warmup-iters", str(run.warmup)),
        *("--optimizer", "adam", *ADAM, "--weight-decay", repr(run.weight_decay)),
        *("--save", checkpoints, "--save-interval", str(run.save_every)),
        *(("--load", checkpoints, "--exit-on-missing-checkpoint") if run.resume else ()),
        # more steps than the checkpoint was written for: the rest of the schedule is held to be the same (policy._folder)
        *(("--override-opt-param-scheduler",) if run.resume else ()),
        *("--log-interval", str(run.log_every), "--seed", str(run.seed)),
    )


def _train_run(run: RunOptions) -> tuple[str, ...]:
    return (
        *("--data", run.prefix, "--out", run.folder, "--steps", str(run.steps)),
        *(("--resume",) if run.resume else ()),
        *("--lr", repr(run.lr), "--min-lr", repr(run.final_lr), "--warmup-steps", str(run.warmup)),
        *("--weight-decay", repr(run.weight_decay), "--save-every", str(run.save_every)),
        *("--log-every", str(run.log_every), "--seed", str(run.seed)),
    )


def _processes(f: Facts) -> Processes:
    p, recipe = f.profile, f"{f.run.folder}/{RECIPE}"
    kernels = [f"{operator}={name}" for operator, name in p.kernels.items()]
    if p.entry == "pretrain":
        entry_args = ["--nam56r-recipe", recipe, "--nam56r-device", f.device.type]
        entry_args += [word for kernel in kernels for word in ("--nam56r-kernel", kernel)]
    else:
        entry_args = ["train", "--recipe", recipe, *(word for kernel in kernels for word in ("--kernel", kernel))]
    return Processes(
        nnodes=p.nodes,
        nproc=p.gpus_per_node,
        rendezvous=p.rendezvous,
        module=MODULES[p.entry],
        entry_args=tuple(entry_args),
    )


def _memory(f: Facts) -> tuple[RankMemory, ...]:
    return tuple(
        RankMemory(
            rank=rank,
            layers=f.pattern.segments[rank :: f.profile.pp],
            weights=estimate.weights,
            gradients=estimate.gradients,
            optimizer=estimate.optimizer,
            activations=estimate.activations,
            logits=estimate.logits,
            workspace=estimate.workspace,
            runtime=estimate.runtime,
            total=estimate.total,
        )
        for rank, estimate in enumerate(f.memory)
    )


def _acceptance(f: Facts) -> PlanAcceptance:
    kernels: dict[str, dict[str, None]] = {}
    for _, part in f.parts:
        for operator, name in part.kernels.items():
            kernels.setdefault(operator, {})[name] = None
    return PlanAcceptance(
        device=f.plan.device,
        dtype=f.plan.dtype,
        accepted=not f.plan_refusals and f.nearest_tp == f.profile.tp,
        kernels={operator: tuple(names) for operator, names in kernels.items()},
        refusals=f.plan_refusals,
    )


def _notes(f: Facts) -> list[str]:
    p = f.profile
    notes = [note for note in f.plan.notes if note not in f.own_translation.custom_notes]
    if p.entry == "train":
        notes.append("nam56r train takes the recipe itself: the native flags say the same, and aren't passed")
    elif f.translation.stack_spec is None:
        notes.append("the recipe has no seam, so Megatron's own layers run: of the plan's kernels only the head's do")
    unused = [f"{op}={name}" for op, name in p.kernels.items() if not any(op in part.shapes for _, part in f.parts)]
    if unused:
        notes.append(f"no part of the model runs the operator of {', '.join(unused)}")
    if p.cuda_graphs != "none":
        notes.append(
            "the graphs' memory pool isn't in the estimate (the published run of this model had 39.5 GiB), and our layers "
            "haven't been captured in a whole training step yet"
        )
    if p.cuda_graphs == "local" and not f.cpu:
        notes.append(
            "without Transformer Engine Megatron's local graphs keep every input and output buffer "
            "(megatron/core/transformer/cuda_graphs.py)"
        )
    if f.microbatches is not None and f.microbatches < p.pp:
        notes.append(f"{f.microbatches} microbatches don't fill {p.pp} pipeline stages: most of each step is idle")
    if p.tp > p.gpus_per_node:
        notes.append(f"tp {p.tp} reaches over nodes of {p.gpus_per_node}: its traffic leaves NVLink")
    return notes
