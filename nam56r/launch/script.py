"""A contract as the shell script that runs it."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable

from nam56r.launch.contract import LaunchContract
from nam56r.launch.options import RECIPE
from nam56r.launch.policy import TRACKER
from nam56r.records import as_yaml
from nam56r.translate import by_flag

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:./-]+")
QUOTES = "“”‘’‛‟′″"  # shellcheck takes them for mistyped quotes


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
        *(f"export {name}={quote(value)}" for name, value in c.fixed_policy.environment.items()),
        "",
        *_recipe(c),
        *_unstarted(c),
        "",
    ]
    if c.passes_native_args:
        lines += _array("native_args", c.generated_native_args)
    else:
        lines += [line for flag in by_flag(c.generated_native_args) for line in _comment(f"native: {' '.join(flag)}")]
    lines += [*_array("policy_args", c.fixed_policy.args), *_array("run_args", c.run_args), ""]
    lines.append(" \\\n  ".join([f"exec {' '.join(c.processes.torchrun)}", *_lines(c.processes.entry_args), expanded]))
    return "\n".join([*lines, ""])


def _all(name: str) -> str:
    """A variable's name, or in bash all that begin so."""
    return f'"${{!{name.removesuffix("*")}@}}"' if name.endswith("*") else name


def _recipe(c: LaunchContract) -> list[str]:
    """Leave the recipe where the entry reads it; end where another one is there already."""
    return [
        f"recipe_file={quote(f'{c.run.folder}/{RECIPE}')}",
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
        f"saved={quote(f'{c.run.folder}/checkpoints/{TRACKER}')}",
        "if [[ -e $saved ]]; then",
        "  printf 'there are checkpoints (%s): go on from them with nam56r launch --resume\\n' \"$saved\" >&2",
        "  exit 2",
        "fi",
    ]


def _array(name: str, args: Iterable[str]) -> list[str]:
    return [f"{name}=(", *(f"  {line}" for line in _lines(args)), ")"]


def _lines(args: Iterable[str]) -> list[str]:
    """One for each flag, quoted."""
    return [" ".join(map(quote, flag)) for flag in by_flag(args)]


def _comment(text: str) -> list[str]:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return [f"# {line}" for line in _folded(shown, 118)]


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def quote(word: str) -> str:
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
