"""The app that every command is put on, and how errors leave it."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib.metadata import version as installed_version
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130


class _Commands(TyperGroup):
    """Answers a ValueError or OSError with one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            typer.echo(f"nam56r: {one_line(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None


def one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Plan and train NAM56R hybrid models in Megatron, on kernels picked slot by slot.",
)


@app.callback()
def common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    # what Megatron says on import about packages that we do without
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version("nam56r"))


def main() -> None:
    """The `nam56r` command. What it prints is UTF-8, whatever the locale: tables, JSON and scripts have more than ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    app(prog_name="nam56r")
