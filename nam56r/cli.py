"""The command line: `nam56r plan`, `train`, `data`, `doctor`, `report`, `version`.

It parses, calls and prints. Bad input is answered with one line and exit code 2, a refused plan with its refusals and
exit code 3. torch and megatron are imported by the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from nam56r.kernels.registry import Device

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
            typer.echo(f"nam56r: {_one_line(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None


def _one_line(error: Exception) -> str:
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
data_commands = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Build and look at data sets in Megatron's indexed format."
)
app.add_typer(data_commands, name="data")


@app.callback()
def common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    # what Megatron says on import about packages that we do without
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


RecipeOption = Annotated[str, typer.Option(metavar="NAME|PATH", help="A named recipe or a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")]
KernelOption = Annotated[
    list[str], typer.Option("--kernel", metavar="OPERATOR=NAME", help="Take this kernel for an operator.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def plan(
    recipe: RecipeOption = "nam56r",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, a100, h100, h200, b200, or here.")] = "here",
    set_: SetOption = [],
    kernel: KernelOption = [],
    micro_batch: Annotated[int, typer.Option(help="Sequences in one pass.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say which kernel every slot would run, and why. Exit code 3 when a slot has none.

    The device need not be present. Activations are bf16 on a GPU, fp32 on a CPU.
    """
    import torch

    from nam56r.plan import PlanRefused, make_plan
    from nam56r.recipe import Recipe
    from nam56r.report import table

    authored, target = Recipe.load(recipe).with_overrides(set_), _device(device)
    try:
        made = make_plan(
            authored,
            target,
            kernels=_pairs(kernel),
            micro_batch=micro_batch,
            tensor_parallel=tp,
            dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
        )
    except PlanRefused as refused:
        made = refused.plan
    typer.echo(json.dumps(made.to_json(), indent=1) if as_json else table.render(made, authored, _width()))
    if not made.accepted:
        raise typer.Exit(REFUSED)


@app.command()
def train(
    data: Annotated[str, typer.Option(metavar="PREFIX", help="What `nam56r data build` wrote.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run's folder.")],
    steps: Annotated[int, typer.Option(help="Updates in all, those before a resume included.")],
    recipe: RecipeOption = "nam56r-tiny",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN.")] = False,
    set_: SetOption = [],
    kernel: KernelOption = [],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel size.")] = 1,
    micro_batch: Annotated[int, typer.Option(help="Sequences in one pass of one process.")] = 1,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences in one update; by default one pass of all.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    min_lr: Annotated[float | None, typer.Option(help="Final learning rate; by default a tenth of the peak.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Linear warm-up; by default a twentieth of the steps.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.1,
    clip_grad: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(help="Newest checkpoints that are kept.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between lines where there is no terminal.")] = 10,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 1,
) -> None:
    """Plan, print the plan, train, and leave plan, metrics, plot and checkpoints in RUN.

    Several processes: `torchrun --nproc-per-node N -m nam56r train …`. Ctrl-C saves; `--resume` goes on. Exit code 3
    when the plan is refused.
    """
    from nam56r.plan import PlanRefused
    from nam56r.recipe import Recipe
    from nam56r.report import table
    from nam56r.train import Diverged, TrainOptions, run

    options = TrainOptions(
        recipe=Recipe.load(recipe).with_overrides(set_),
        data=data,
        out=out,
        steps=steps,
        resume=resume,
        kernels=_pairs(kernel),
        device=device,
        tp=tp,
        ep=ep,
        micro_batch=micro_batch,
        global_batch=global_batch,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        save_every=save_every,
        keep=keep,
        log_every=log_every,
        seed=seed,
    )
    first = os.environ.get("RANK", "0") == "0"
    try:
        outcome = run(options, show=lambda plan: typer.echo(table.render(plan, options.recipe, _width())))
    except PlanRefused as refused:
        if first:
            typer.echo(table.render(refused.plan, options.recipe, _width()))
        raise typer.Exit(REFUSED) from None
    except Diverged as diverged:
        typer.echo(f"nam56r: {_one_line(diverged)}", err=True)
        raise typer.Exit(FAILED) from None
    if first:
        typer.echo(f"step {outcome.step}: LM loss {outcome.lm_loss:.4f}; {outcome.plot}; {outcome.checkpoint}")
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


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


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what every slot could run on here and on an H200."""
    from nam56r import doctor

    found = doctor.examine()
    typer.echo(json.dumps(found, indent=1) if as_json else doctor.render(found, _width()))


@app.command()
def report(
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where the benches left <device>.json.")] = Path(
        "bench/results"
    ),
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where report.md and its plots go.")] = Path("runs/report"),
) -> None:
    """Turn measured results into a page with a table and plots."""
    from nam56r.report import bench

    records = bench.read(results)
    typer.echo(f"{bench.write(records, out)}: {len(records)} results")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version("nam56r"))


def _width() -> int:
    return shutil.get_terminal_size().columns


def _device(name: str) -> Device:
    import torch

    from nam56r.kernels.registry import DEVICES, Device

    if name == "here":
        return Device.of("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise ValueError(f"--device is {name!r}, but must be here or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def _pairs(settings: Iterable[str]) -> dict[str, str]:
    """["operator=name", …] as a mapping; an unknown operator or a missing = is a ValueError."""
    from nam56r.kernels.registry import FAMILY

    chosen = {}
    for setting in settings:
        operator, _, name = setting.partition("=")
        if not name:
            raise ValueError(f"--kernel is {setting!r}, but must be operator=name, such as m2rnn=reference")
        if operator not in FAMILY:
            raise ValueError(f"--kernel names the operator {operator!r}, but must name one of {', '.join(FAMILY)}")
        chosen[operator] = name
    return chosen


def main() -> None:
    """The `nam56r` command."""
    app(prog_name="nam56r")
