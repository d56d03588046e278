"""A launch contract as text for an operator, in titled blocks without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nam56r import memory
from nam56r.launch.contract import LaunchContract, RankMemory
from nam56r.launch.facts import Check
from nam56r.launch.script import quote
from nam56r.report.table import wrap
from nam56r.translate import by_flag


def render(contract: LaunchContract, width: int = 80) -> str:
    """The whole contract in titled blocks, refusals first; without colour, in `width` columns."""
    c = contract
    verdict = "accepted" if c.accepted else f"refused: {len(c.refused)} of {len(c.checks)} checks"
    heading = wrap(f"{c.recipe.name} on profile {c.profile.name}: {verdict}", width, 2)
    blocks = [
        ("refused", [line for check in c.refused for line in _refusal(check, width)]),
        ("profile", list(_profile(c, width))),
        ("checks", [wrap(f"  {check.name}: {check.value}", width, 4) for check in c.checks if check.passed]),
        ("memory per pipeline rank, estimated, GiB", list(_memory(c, width))),
        ("environment", [wrap(f"  {line}", width, 4) for line in _environment(c)]),
        ("torchrun", list(_words(_command(c), width))),
        (f"native args, {_passed(c)}", list(_words(c.generated_native_args, width)) or ["  none: see the refusals"]),
        ("fixed policy", list(_words(c.fixed_policy.args, width))),
        ("run", list(_words(c.run_args, width))),
        ("custom notes", [wrap(f"  {note}", width, 4) for note in c.custom_notes]),
        ("notes", [wrap(f"  {note}", width, 4) for note in c.notes]),
    ]
    text = [heading]
    for title, lines in blocks:
        if lines:
            text += ["", f"{title} ".ljust(width, "-"), *lines]
    return "\n".join(text)


def _refusal(check: Check, width: int) -> Iterator[str]:
    """What there is, the rule, and what to do: one line each, or one for each of several."""
    yield f"  {check.name}"
    for title, text in (("has", check.value), ("rule", check.rule), ("do", check.remedy)):
        for i, part in enumerate(text.split("; ") if title != "rule" else [text]):
            yield wrap(f"    {'' if i else title:<6}{part}", width, 12)


def _profile(c: LaunchContract, width: int) -> Iterator[str]:
    p, policy = c.profile, c.fixed_policy
    layers = (p.layout or c.recipe.layers.layers).split("|")
    rows = {
        "device": f"{p.device}, {p.nodes} node{'s' * (p.nodes > 1)} of {p.gpus_per_node} process"
        f"{'es' * (p.gpus_per_node > 1)}, entry {c.entry}",
        "layout": " | ".join(layers),
        "depth": f"{p.depth}; R layers {_numbers(p.r_layer_indices)}; DSA ranks {_numbers(p.dsa_ranks)}",
        "parallel": f"tp {p.tp}, pp {p.pp}, vpp {p.vpp}, ep {p.ep}, cp {p.cp}, dp {policy.parallel.dp or 'none'}",
        "batch": f"micro {p.micro_batch}, global {p.global_batch}, microbatches {policy.batch.microbatches or 'none'}",
        "mtp": f"{p.mtp_depths} depth{'s' * (p.mtp_depths != 1)}",
        "sparse": p.sparse_mode,
        "graphs": p.cuda_graphs,
        "recompute": p.recompute,
        "precision": f"{p.precision}, {'distributed' if p.distributed_optimizer else 'whole'} optimizer",
        "guards": f"clip_grad {p.guards.clip_grad}, check_nan {str(p.guards.check_nan).lower()}, "
        f"loss_scale {p.guards.loss_scale or 'none'}",
        "plan": f"{c.plan.dtype} on {c.plan.device}: {'accepted' if c.plan.accepted else 'refused'}",
        "kernels": ", ".join(f"{op} {'/'.join(names)}" for op, names in c.plan.kernels.items()),
    }
    for name, value in rows.items():
        yield wrap(f"  {name:<11}{value}", width, 13)


def _memory(c: LaunchContract, width: int) -> Iterator[str]:
    if not c.memory:
        return
    yield "  rank   weights  gradients  optimizer  activations  buffers  runtime  total"
    for rank in c.memory:
        held = rank.weights, rank.gradients, rank.optimizer, sum(rank.activations.values())
        sizes = (*held, rank.logits + rank.workspace, rank.runtime, rank.total)
        cells = zip(sizes, (10, 11, 11, 13, 9, 9, 7), strict=True)
        yield f"  {rank.rank:>4}" + "".join(f"{size / memory.GIB:>{width}.1f}" for size, width in cells)
    if c.memory_available is not None:
        yield f"  available to a process: {c.memory_available / memory.GIB:.1f}"
    worst = max(c.memory, key=lambda rank: rank.total)
    yield wrap(f"  activations of rank {worst.rank}: {_activations(worst)}", width, 4)


def _activations(rank: RankMemory) -> str:
    return ", ".join(f"{family} {size / memory.GIB:.1f}" for family, size in rank.activations.items() if size)


def _environment(c: LaunchContract) -> Iterator[str]:
    yield from (f"{name}={quote(value)}" for name, value in c.fixed_policy.environment.items())
    yield f"not inherited: {', '.join(c.fixed_policy.not_inherited)}"


def _command(c: LaunchContract) -> tuple[str, ...]:
    arrays = ("NATIVE", "POLICY", "RUN") if c.passes_native_args else ("POLICY", "RUN")
    return (*c.processes.torchrun, *c.processes.entry_args, *arrays)


def _passed(c: LaunchContract) -> str:
    return "from the recipe" if c.passes_native_args else "from the recipe; not passed to nam56r train"


def _words(args: Iterable[str], width: int) -> Iterator[str]:
    """Flags side by side in lines of at most width columns, a flag with its value where that fits."""
    line = " "
    for flag in by_flag(args):
        words = [quote(word) for word in flag]
        for piece in [" ".join(words)] if len(" ".join(words)) + 4 <= width else words:
            if line.strip() and len(line) + 1 + len(piece) > width:
                yield line
                line = "   "
            line += f" {piece}"
    if line.strip():
        yield line


def _numbers(numbers: tuple[int, ...] | None) -> str:
    return " ".join(map(str, numbers or ())) or "none"
