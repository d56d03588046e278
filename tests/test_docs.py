"""What the pages under docs/ show of the command line is what it prints.

In a ```console block, `$ nam56r …` is a command and the lines after it its output at 80 columns, both streams. A command
goes on after a trailing backslash; a line `...` stands for any number of lines. Other commands aren't run.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from nam56r import cli

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


class Shown(NamedTuple):
    """A command and the lines that follow it; line is where it stands in its page."""

    line: int
    command: str
    output: tuple[str, ...]


def commands(page: str) -> list[Shown]:
    """Every `$ …` of the console blocks of a page."""
    found: list[Shown] = []
    block = going_on = False
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("```"):
            block, going_on = line.strip() == "```console", False
        elif not block:
            continue
        elif going_on:
            found[-1] = found[-1]._replace(command=found[-1].command + " " + line.strip().removesuffix("\\"))
            going_on = line.endswith("\\")
        elif line.startswith("$ "):
            found.append(Shown(number, line[2:].removesuffix("\\"), ()))
            going_on = line.endswith("\\")
        elif found:
            found[-1] = found[-1]._replace(output=(*found[-1].output, line))
    return found


def matches(shown: tuple[str, ...], printed: str) -> bool:
    """Whether the printed lines are the shown ones, `...` being any of them."""
    pattern = "".join("(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(line.rstrip() + "\n" for line in printed.splitlines())) is not None


OURS = [
    pytest.param(shown, id=f"{page.name}:{shown.line}")
    for page in PAGES
    for shown in commands(page.read_text(encoding="utf-8"))
    if shown.command.split()[0] == "nam56r"
]


@pytest.mark.parametrize("shown", OURS)
def test_a_page_shows_what_is_printed(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(shown.command)[1:]
    result = CliRunner().invoke(cli.app, words, prog_name="nam56r", env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert matches(shown.output, result.output), f"{shown.command} prints:\n{result.output}"


def test_translation_is_shown():
    assert sum("translation.md" in shown.id for shown in OURS) >= 3


def test_blocks_commands_and_elisions_are_read():
    page = "\n".join(
        [
            "$ nam56r no",
            "```console",
            "$ nam56r a \\",
            "    --b 1",
            "one",
            "...",
            "two",
            "$ ls",
            "x",
            "```",
            "```",
            "$ c",
        ]
    )
    assert commands(page) == [Shown(3, "nam56r a  --b 1", ("one", "...", "two")), Shown(8, "ls", ("x",))]
    assert matches(("one", "...", "two"), "one\ntwo\n") and matches(("one", "...", "two"), "one\n1.5\n1.6\ntwo")
    assert matches(("...", "two  "), "one\ntwo\n") and matches((), "")
    for printed in ("one\ntwo\nthree", "zero\none\ntwo", "one", "one\ntwo "[:-2], ""):
        assert not matches(("one", "...", "two"), printed)
