"""`nam56r data build` and `nam56r data inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nam56r.cli.app import app
from nam56r.cli.options import JsonOption

data_commands = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Build and look at data sets in Megatron's indexed format."
)
app.add_typer(data_commands, name="data")


@data_commands.command("build")
def data_build(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Files and folders.")],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    tokenizer_type: Annotated[str, typer.Option(help="Megatron's name of the tokenizer.")] = "ByteLevelTokenizer",
    tokenizer_model: Annotated[str | None, typer.Option(help="Its file, folder or hub name.")] = None,
    include: Annotated[list[str], typer.Option(metavar="GLOB", help="Only files like this, such as '*.py'.")] = [],
    max_file_bytes: Annotated[int, typer.Option(min=1, help="Larger files are skipped.")] = 4 * 2**20,
    limit_bytes: Annotated[int | None, typer.Option(min=1, help="At most so much text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many tokens.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is there.")] = False,
) -> None:
    """Turn text and code files into a data set; every file is one document.

    Folders are walked in sorted order. Skipped, and named with the reason in PREFIX.json: hidden files and folders
    (.git, .venv, …), folders that tools build or install (`__pycache__`, node_modules, site-packages, venv, build, dist,
    CMakeFiles, `*.egg-info`), symbolic links, and files that are empty, binary, not UTF-8, unreadable or too large.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from nam56r.data.tokenizer import Tokenizer
    from nam56r.data.writer import build

    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None)
        manifest = build(
            paths,
            out,
            tokenizer=Tokenizer(type=tokenizer_type, model=tokenizer_model),
            include=include,
            max_file_bytes=max_file_bytes,
            limit_bytes=limit_bytes,
            max_tokens=max_tokens,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(manifest.summary(out))


@data_commands.command("inspect")
def data_inspect(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX")],
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Print the start of the first N documents.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of PREFIX.bin and check its SHA-256.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a data set and say what is in it. Exit code 2 when a file is missing, truncated or damaged."""
    from nam56r.data import dataset

    manifest = dataset.read_manifest(prefix)
    dataset.read_lengths(prefix, manifest)
    if verify:
        dataset.verify(prefix, manifest)
    starts = list(dataset.texts(prefix, manifest, show)) if show else []
    if as_json:
        shown = {"starts": starts} if show else {}
        typer.echo(json.dumps({"prefix": str(prefix), **manifest.model_dump(), **shown}, indent=1))
        return
    typer.echo(manifest.summary(prefix))
    for number, start in enumerate(starts, 1):
        typer.echo(f"--- document {number}\n{start}")
