"""The checks of policy: graphs, precision, environment, entry, kernels, memory, and what a run here and now needs."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from nam56r import memory
from nam56r.kernels.registry import Device
from nam56r.launch.facts import ARGUMENTS, CONFIG, Check, Facts, kernel_names
from nam56r.launch.options import CONTRACT, RECIPE, RunOptions
from nam56r.launch.profile import ENVIRONMENT, purpose
from nam56r.recipe import Recipe
from nam56r.translate import together

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's name of the newest checkpoint


def graphs(f: Facts) -> Iterator[Check]:
    """What CUDA graphs can't capture, or Megatron doesn't allow beside them."""
    p = f.profile
    kind, off = p.cuda_graphs, "cuda_graphs = none"

    def check(name: str, passed: bool, value: str, rule: str, remedy: str = "") -> Check:
        return Check(name=name, passed=passed, value=value, rule=rule, remedy="; or ".join(filter(None, (remedy, off))))

    if kind == "none":
        return
    yield check("graphs: device", not f.cpu, f"{kind} on {p.device}", "CUDA graphs need a GPU")
    yield check(
        "graphs: recompute",
        p.recompute == "none" or kind == "full_iteration",
        f"cuda_graphs {kind}, recompute {p.recompute}",
        f"full recompute goes with full_iteration only ({CONFIG})",
        "recompute = none",
    )
    yield check(
        "graphs: NaN check",
        kind != "full_iteration" or not p.guards.check_nan,
        f"cuda_graphs {kind}, guards.check_nan {_yes(p.guards.check_nan)}",
        f"the check reads the loss on the host, which full_iteration can't ({ARGUMENTS})",
        "guards.check_nan = false",
    )
    yield check(
        "graphs: Transformer Engine",
        kind != "transformer_engine" or _has_transformer_engine(),
        f"cuda_graphs {kind}, Transformer Engine {'installed' if _has_transformer_engine() else 'not installed'}",
        "transformer_engine captures with Transformer Engine's own functions (megatron/core/transformer/cuda_graphs.py)",
        "cuda_graphs = local",
    )
    yield check(
        "graphs: shared indices",
        kind == "full_iteration" or not f.recipe.shares_indices,
        f"cuda_graphs {kind}, dsa.share_every {f.recipe.dsa.share_every}",
        "graphs of single layers hand on the hidden states alone (megatron/core/transformer/cuda_graphs.py)",
        "cuda_graphs = full_iteration",
    )
    yield check(
        "graphs: experts",
        p.ep == 1 or "E" not in f.recipe.layers.layers,
        f"cuda_graphs {kind}, ep {p.ep}",
        "with ep > 1 the dispatcher reads the experts' token counts on the host "
        "(megatron/core/transformer/moe/token_dispatcher.py)",
        "ep = 1",
    )
    slow: dict[str, list[str]] = {}
    for layer, part in f.parts:
        for operator, name in part.kernels.items():
            if name in kernel_names(operator, role="development"):
                slow.setdefault(f"{operator}={name}", []).append(str(layer))
    yield check(
        "graphs: kernels",
        not slow,
        "; ".join(f"{kernel} at {', '.join(at)}" for kernel, at in slow.items()) or "no development kernel is used",
        "development kernels (references) read the host or allocate as the data says: they aren't held to capture",
        "kernels of another role",
    )
    settings = [f"{name} = {value}" for name, value in p.environment.items() if purpose(name) == "allocator"]
    expandable = any("expandable_segments:True" in setting for setting in settings)
    yield check(
        "graphs: allocator",
        kind != "transformer_engine" or not expandable or p.environment.get("NCCL_GRAPH_REGISTER") == "0",
        f"{', '.join(settings) or 'no allocator setting'}, NCCL_GRAPH_REGISTER "
        f"{p.environment.get('NCCL_GRAPH_REGISTER', 'unset')}",
        f"transformer_engine's graphs over expandable segments need NCCL_GRAPH_REGISTER 0 ({ARGUMENTS})",
        'environment.NCCL_GRAPH_REGISTER = "0"',
    )


def precision(f: Facts) -> Iterator[Check]:
    """Precision, guards, optimizer and sparse mode against the device and against each other."""
    p = f.profile
    yield Check(
        name="precision",
        passed=not f.cpu or p.precision == "fp32",
        value=f"{p.precision} on {p.device}",
        rule="a CPU run is fp32",
        remedy="precision = fp32",
    )
    yield Check(
        name="loss scale",
        passed=p.guards.loss_scale is None or p.precision == "fp16",
        value=f"guards.loss_scale {p.guards.loss_scale or 'none'} with {p.precision}",
        rule="gradients are scaled in fp16 only",
        remedy="guards.loss_scale = null",
    )
    yield Check(
        name="NaN check",
        passed=p.precision != "fp16" or p.guards.loss_scale is not None or not p.guards.check_nan,
        value=f"guards.check_nan {_yes(p.guards.check_nan)}, {p.precision}, guards.loss_scale {p.guards.loss_scale or 'none'}",
        rule=f"a dynamic loss scale overflows on purpose, so Megatron switches the check off ({ARGUMENTS})",
        remedy="guards.check_nan = false; or guards.loss_scale = 4096",
    )
    yield Check(
        name="optimizer",
        passed=p.distributed_optimizer or p.precision == "fp32",
        value=f"distributed_optimizer {_yes(p.distributed_optimizer)} in {p.precision}",
        rule="in bf16 and fp16 Megatron's other optimizer can't save the parameters that stay fp32",
        remedy="distributed_optimizer = true",
    )
    yield Check(
        name="sparse mode",
        passed=p.sparse_mode == "sparse",
        value=f"sparse_mode {p.sparse_mode}",
        rule="warmup trains the indexer over all keys, which has no implementation yet",
        remedy="sparse_mode = sparse",
    )


def environment(f: Facts) -> Iterator[Check]:
    """Variables that a profile may set, and those that Megatron asks for."""
    p, variables = f.profile, f.profile.environment
    foreign = [name for name in variables if purpose(name) is None]
    yield Check(
        name="environment",
        passed=not foreign,
        value=", ".join(f"{name} = {variables[name]}" for name in foreign) or f"{len(variables)} variables",
        rule=f"a profile sets variables of {', '.join(ENVIRONMENT)}: none that could decide mathematics",
        remedy="; ".join(f"environment.{name} = null" for name in foreign),
    )
    both = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= variables.keys()
    if both:
        yield Check(
            name="allocator",
            passed=False,
            value="PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF",
            rule="torch reads one of them, and it isn't settled which",
            remedy="environment.PYTORCH_CUDA_ALLOC_CONF = null",
        )
    if not f.cpu and f.device.capability < (10, 0) and max(p.tp, p.cp) > 1:
        has = variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
        yield Check(
            name="connections",
            passed=has == "1",
            value=f"CUDA_DEVICE_MAX_CONNECTIONS {has} with tp {p.tp}, cp {p.cp} on {p.device}",
            rule=f"before Blackwell, tp or cp over 1 needs it at 1 ({ARGUMENTS})",
            remedy='environment.CUDA_DEVICE_MAX_CONNECTIONS = "1"',
        )


def entry(f: Facts) -> Iterator[Check]:
    """What each entry lacks."""
    p = f.profile
    if p.entry == "pretrain":
        yield Check(
            name="stack",
            passed=f.translation.stack_spec is not None or _has_transformer_engine(),
            value=f.translation.stack_spec or "Megatron's own stack: the recipe has no seam",
            rule="Megatron's own hybrid stack needs Transformer Engine, ours doesn't",
            remedy="entry = train; or install transformer-engine",
        )
        return
    has_to_be = {
        "pp": (p.pp, 1),
        "vpp": (p.vpp, 1),
        "cp": (p.cp, 1),
        "cuda_graphs": (p.cuda_graphs, "none"),
        "recompute": (p.recompute, "none"),
        "precision": (p.precision, "fp32" if f.cpu else "bf16"),
        "distributed_optimizer": (p.distributed_optimizer, not f.cpu),
        "guards.check_nan": (p.guards.check_nan, True),
    }
    wrong = {name: pair for name, pair in has_to_be.items() if pair[0] != pair[1]}
    yield Check(
        name="entry",
        passed=not wrong,
        value=", ".join(f"{name} = {_yes(has)}" for name, (has, _) in wrong.items()) or "train",
        rule="nam56r train has no pipeline schedule, context parallelism, CUDA graphs or recompute, trains in bf16 on a GPU "
        "and fp32 on a CPU, and always stops at a NaN",
        remedy="entry = pretrain; or " + ", ".join(f"{name} = {_yes(value)}" for name, (_, value) in wrong.items()),
    )


def translation(f: Facts) -> Iterator[Check]:
    """The recipe's own faults, and slots that no kernel runs."""
    refusals = f.translation.refusals
    yield Check(
        name="translation",
        passed=not refusals,
        value="; ".join(f"{r.operator} at {r.layer}: {', '.join(r.reasons)}" for r in refusals)
        or f"{f.translation.native_pattern}{', strict' * f.strict}",
        rule="features are where they belong and implemented, and nothing but a seam is left"
        + (", and strict refuses seams" if f.strict else ""),
        remedy="the recipe, as each reason says" + ("; or a launch without --strict" if f.strict else ""),
    )
    yield Check(
        name="kernel names",
        passed=not f.unknown_kernels,
        value="; ".join(f.unknown_kernels) or f"{len(f.profile.kernels)} asked for by name",
        rule="a kernel is asked for by an operator's and a kernel's name",
        remedy="names from those lists",
    )
    places = together(f.plan_refusals)
    by_name = [op for op, reasons in places if any(f"({op}=" in reason for reason in reasons)]
    yield Check(
        name="plan",
        passed=not places,
        value="; ".join(f"{op} at {', '.join(at)}: {', '.join(why)}" for (op, why), at in places.items())
        or f"a kernel for every operator on {f.profile.device} in {f.profile.precision}",
        rule="every operator of every slot has a kernel before anything is built",
        remedy=", ".join(f"kernels.{op} = reference" for op in by_name) or "another shape, device or precision",
    )


def fits(f: Facts) -> Iterator[Check]:
    """The estimate of the fullest pipeline rank against a device."""
    if not f.memory:
        value, passed, remedy = "not estimated", False, "segments, processes and batch that fit together, first"
    else:
        worst = max(range(len(f.memory)), key=lambda rank: f.memory[rank].total)
        need, free = f.memory[worst].total, f.free
        there = "unknown" if free is None else f"{free / memory.GIB:.1f} GiB"
        value = (
            f"{need / memory.GIB:.1f} GiB estimated on pipeline rank {worst}, {there} a process on {f.profile.device}"
        )
        passed = free is None or need <= free
        remedy = "; or ".join(_smaller(f))
    yield Check(
        name="memory",
        passed=passed,
        value=value,
        rule="weights, gradients, optimizer, activations and buffers fit (estimated, without a graph pool or fragmentation)",
        remedy=remedy,
    )


def _smaller(f: Facts) -> Iterator[str]:
    """Changes of one key with which the estimate fits."""
    p, tried = f.profile, []
    if p.recompute == "none" and p.entry == "pretrain" and p.cuda_graphs in ("none", "full_iteration"):
        tried.append("recompute = full")
    divisors = (
        [n for n in range(p.micro_batch - 1, 0, -1) if not p.micro_batch % n][:3] if p.micro_batch < 4096 else [1]
    )
    tried += [f"micro_batch = {n}" for n in divisors]
    for setting in tried:
        other = Facts(f.recipe, p.with_overrides([setting.replace(" = ", "=")]), f.run)
        if other.memory and max(rank.total for rank in other.memory) <= (f.free or 0):
            yield setting
    yield "more devices, or a smaller recipe"


def here(f: Facts) -> Iterator[Check]:
    """What a run on this machine, now, needs beside the contract."""
    if not f.here:
        return
    p = f.profile
    if not f.cpu:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = Device.of("cuda").name if count else "none"
        yield Check(
            name="this machine",
            passed=count >= p.gpus_per_node and name == p.device,
            value=f"{count} GPUs here ({name})",
            rule=f"{p.gpus_per_node} of {p.device} to run on",
            remedy="run it where they are, or --dry-run",
        )
    from nam56r import data  # megatron comes with it: only where a run is to start

    try:
        vocabulary = data.open(f.run.data).vocab_size
        fault = "" if vocabulary <= f.recipe.vocab_size else f"token ids up to {vocabulary - 1}"
    except (ValueError, OSError) as error:
        fault = str(error)
    yield Check(
        name="data",
        passed=not fault,
        value=fault or f.run.data,
        rule=f"a data set of at most vocab_size = {f.recipe.vocab_size} tokens",
        remedy="`nam56r data build`, or the recipe's vocab_size",
    )
    yield _folder(f)


def _folder(f: Facts) -> Check:
    """The run's folder: new, or with --resume what the same launch left, with a checkpoint."""
    folder, fault = Path(f.run.out), ""
    try:
        there = (folder / CONTRACT).exists()
        if folder.exists() and not folder.is_dir():
            fault = f"{folder} is no folder"
        elif f.run.resume:
            fault = "; ".join(_otherwise(f, folder)) if there else f"{folder} has no launch"
        elif there:
            fault = f"{folder} has a launch already"
    except OSError as error:  # a name that is too long, a folder that can't be entered
        fault = f"{folder}: {error.strerror}"
    return Check(
        name="folder",
        passed=not fault,
        value=fault or f.run.out,
        rule="a run starts in a folder without one, and is resumed with the recipe, entry, learning rates, warm-up, "
        "weight decay and seed it started with",
        remedy="another --out, without --resume" if f.run.resume else "--resume, or another --out",
    )


def _otherwise(f: Facts, folder: Path) -> Iterator[str]:
    """What keeps a launch from going on with the one in its folder."""
    try:
        yield from f.recipe.differences(Recipe.load(folder / RECIPE))
        before = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))
        run, entry = RunOptions(**before["run"]), before["entry"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        yield f"{folder} has no launch that can be read: {error}"
        return
    # Megatron reads the learning rates from the checkpoint: others would be shown and not taken
    for name in ("lr", "final_lr", "warmup_steps", "weight_decay", "seed"):
        if getattr(f.run, name) != getattr(run, name):
            yield f"{name}: {getattr(f.run, name)} here, {getattr(run, name)} there"
    if f.profile.entry != entry:
        yield f"entry: {f.profile.entry} here, {entry} there, with checkpoints of another form"
    elif entry == "pretrain" and not (folder / "checkpoints" / TRACKER).exists():
        yield f"{folder} has no checkpoint"


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _yes(value: object) -> str:
    return re.sub("^(True|False)$", lambda found: found[0].lower(), str(value))
