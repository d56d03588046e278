"""A contract as text for an operator, and as the shell script that runs it."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator

from nam56r import memory
from nam56r.launch.contract import LaunchContract, RankMemory
from nam56r.launch.facts import Check
from nam56r.launch.options import RECIPE
from nam56r.launch.policy import TRACKER
from nam56r.records import as_yaml

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:./-]+")
QUOTES = "“”‘’‛‟′″"  # shellcheck takes them for mistyped quotes


def render(contract: LaunchContract, width: int = 80) -> str:
    """The whole contract in titled blocks, refusals first; without colour, in `width` columns."""
    c = contract
    verdict = "accepted" if c.accepted else f"refused: {len(c.refused)} of {len(c.checks)} checks"
    heading = _wrap(f"{c.recipe.name} on profile {c.profile.name}: {verdict}", width, 2)
    blocks = [
        ("refused", [line for check in c.refused for line in _refusal(check, width)]),
        ("profile", list(_profile(c, width))),
        ("checks", [_wrap(f"  {check.name}: {check.value}", width, 4) for check in c.checks if check.passed]),
        ("memory per pipeline rank, estimated, GiB", list(_memory(c, width))),
        ("environment", [_wrap(f"  {line}", width, 4) for line in _environment(c)]),
        ("torchrun", list(_words(_command(c), width))),
        (f"native args, {_passed(c)}", list(_words(c.generated_native_args, width)) or ["  none: see the refusals"]),
        ("fixed policy", list(_words(c.fixed_policy.args, width))),
        ("run", list(_words(c.run_args, width))),
        ("custom notes", [_wrap(f"  {note}", width, 4) for note in c.custom_notes]),
        ("notes", [_wrap(f"  {note}", width, 4) for note in c.notes]),
    ]
    text = [heading]
    for title, lines in blocks:
        if lines:
            text += ["", f"{title} ".ljust(width, "-"), *lines]
    return "\n".join(text)


def shell(contract: LaunchContract) -> str:
    """A bash script that runs an accepted contract. Raises ValueError for a refused one.

    Native flags, policy and run are three arrays; nothing in them is expanded by the shell.
    """
    c = contract
    if not c.accepted:
        names = ", ".join(check.name for check in c.refused)
        raise ValueError(f"{c.recipe.name} on profile {c.profile.name} is refused ({names}): there is no script for it")
    arrays = ["policy_args", "run_args"]
    if c.passes_native_args:
        arrays.insert(0, "native_args")
    expanded = " ".join(f'"${{{name}[@]}}"' for name in arrays)
    lines = [
        "#!/usr/bin/env bash",
        *_comment(f"launch: {c.recipe.name} on profile {c.profile.name}"),
        *(line for note in c.custom_notes for line in _comment(f"custom: {note}")),
        *(line for note in c.notes for line in _comment(f"note: {note}")),
        "set -euo pipefail",
        "",
        "# what could decide mathematics, processes or checks isn't inherited",
        " \\\n".join(_folded(f"unset {' '.join(map(_all, c.fixed_policy.not_inherited))}", 116)),
        *(f"export {name}={_quote(value)}" for name, value in c.fixed_policy.environment.items()),
        "",
        *_recipe(c),
        *_unstarted(c),
        "",
    ]
    if c.passes_native_args:
        lines += _array("native_args", c.generated_native_args)
    else:
        lines += [line for flag in _flags(c.generated_native_args) for line in _comment(f"native: {' '.join(flag)}")]
    lines += [*_array("policy_args", c.fixed_policy.args), *_array("run_args", c.run_args), ""]
    lines.append(" \\\n  ".join([f"exec {' '.join(c.processes.torchrun)}", *_lines(c.processes.entry_args), expanded]))
    return "\n".join([*lines, ""])


def _refusal(check: Check, width: int) -> Iterator[str]:
    """What there is, the rule, and what to do: one line each, or one for each of several."""
    yield f"  {check.name}"
    for title, text in (("has", check.value), ("rule", check.rule), ("do", check.remedy)):
        for i, part in enumerate(text.split("; ") if title != "rule" else [text]):
            yield _wrap(f"    {'' if i else title:<6}{part}", width, 12)


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
        yield _wrap(f"  {name:<11}{value}", width, 13)


def _memory(c: LaunchContract, width: int) -> Iterator[str]:
    if not c.memory:
        return
    yield "  rank   weights  gradients  optimizer  activations  logits  runtime   total"
    for rank in c.memory:
        sizes = (rank.weights, rank.gradients, rank.optimizer, sum(rank.activations.values()), rank.logits)
        cells = zip((*sizes, rank.runtime, rank.total), (10, 11, 11, 13, 8, 9, 8), strict=True)
        yield f"  {rank.rank:>4}" + "".join(f"{size / memory.GIB:>{width}.1f}" for size, width in cells)
    if c.memory_available is not None:
        yield f"  available to a process: {c.memory_available / memory.GIB:.1f}"
    worst = max(c.memory, key=lambda rank: rank.total)
    yield _wrap(f"  activations of rank {worst.rank}: {_activations(worst)}", width, 4)


def _activations(rank: RankMemory) -> str:
    return ", ".join(f"{family} {size / memory.GIB:.1f}" for family, size in rank.activations.items() if size)


def _environment(c: LaunchContract) -> Iterator[str]:
    yield from (f"{name}={_quote(value)}" for name, value in c.fixed_policy.environment.items())
    yield f"not inherited: {', '.join(c.fixed_policy.not_inherited)}"


def _all(name: str) -> str:
    """A variable's name, or in bash all that begin so."""
    return f'"${{!{name.removesuffix("*")}@}}"' if name.endswith("*") else name


def _recipe(c: LaunchContract) -> list[str]:
    """Leave the recipe where the entry reads it; end where another one is there already."""
    return [
        f"recipe_file={_quote(f'{c.run.folder}/{RECIPE}')}",
        "recipe=$(",
        "  cat <<'RECIPE'",
        as_yaml(c.recipe).rstrip(),
        "RECIPE",
        ")",
        "if [[ ! -e $recipe_file ]]; then",
        '  mkdir -p "${recipe_file%/*}"',
        '  printf \'%s\\n\' "$recipe" >"$recipe_file"',
        "fi",
        'if [[ $(<"$recipe_file") != "$recipe" ]]; then',
        "  printf '%s is another recipe than this launch has\\n' \"$recipe_file\" >&2",
        "  exit 2",
        "fi",
    ]


def _unstarted(c: LaunchContract) -> list[str]:
    """End where checkpoints are that Megatron would write over; `nam56r train` sees to that itself."""
    if c.entry == "train" or c.run.resume:
        return []
    return [
        f"saved={_quote(f'{c.run.folder}/checkpoints/{TRACKER}')}",
        "if [[ -e $saved ]]; then",
        "  printf 'there are checkpoints (%s): go on from them with nam56r launch --resume\\n' \"$saved\" >&2",
        "  exit 2",
        "fi",
    ]


def _command(c: LaunchContract) -> tuple[str, ...]:
    arrays = ("NATIVE", "POLICY", "RUN") if c.passes_native_args else ("POLICY", "RUN")
    return (*c.processes.torchrun, *c.processes.entry_args, *arrays)


def _passed(c: LaunchContract) -> str:
    return "from the recipe" if c.passes_native_args else "from the recipe; not passed to nam56r train"


def _flags(args: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Words by flag: each group begins with one."""
    group: list[str] = []
    for word in args:
        if word.startswith("--") and group:
            yield tuple(group)
            group = []
        group.append(word)
    if group:
        yield tuple(group)


def _words(args: Iterable[str], width: int) -> Iterator[str]:
    """Flags side by side in lines of at most width columns, a flag with its value where that fits."""
    line = " "
    for flag in _flags(args):
        words = [_quote(word) for word in flag]
        for piece in [" ".join(words)] if len(" ".join(words)) + 4 <= width else words:
            if line.strip() and len(line) + 1 + len(piece) > width:
                yield line
                line = "   "
            line += f" {piece}"
    if line.strip():
        yield line


def _array(name: str, args: Iterable[str]) -> list[str]:
    return [f"{name}=(", *(f"  {line}" for line in _lines(args)), ")"]


def _lines(args: Iterable[str]) -> list[str]:
    """One for each flag, quoted."""
    return [" ".join(map(_quote, flag)) for flag in _flags(args)]


def _comment(text: str) -> list[str]:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return [f"# {line}" for line in _folded(shown, 118)]


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _quote(word: str) -> str:
    """A word as bash reads it back, whatever is in it: plain, in double quotes, or byte by byte."""
    if PLAIN.fullmatch(word):
        return word
    if word.isprintable() and not set(word) & set(QUOTES):
        return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "'": "\\'", "\\": "\\\\"}
    pieces = [
        named.get(c) or (c if c.isascii() and c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)))
        for c in word
    ]
    return f"$'{''.join(pieces)}'"


def _numbers(numbers: tuple[int, ...] | None) -> str:
    return " ".join(map(str, numbers or ())) or "none"


def _wrap(text: str, width: int, indent: int) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
