"""`nam56r train` and `nam56r report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nam56r.cli.app import FAILED, INTERRUPTED, REFUSED, app, one_line
from nam56r.cli.options import (
    KernelOption,
    LrOption,
    MinLrOption,
    RecipeOption,
    ResumeOption,
    SaveOption,
    SeedOption,
    SetOption,
    WarmupOption,
    WeightDecayOption,
    width,
)


@app.command()
def train(
    data: Annotated[str, typer.Option(metavar="PREFIX", help="What `nam56r data build` wrote.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run's folder.")],
    steps: Annotated[int, typer.Option(help="Updates in all, those before a resume included.")],
    recipe: RecipeOption = "nam56r-tiny",
    resume: ResumeOption = False,
    set_: SetOption = [],
    kernel: KernelOption = [],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel size.")] = 1,
    micro_batch: Annotated[int, typer.Option(help="Sequences in one pass of one process.")] = 1,
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences in one update; by default one pass of all.")
    ] = None,
    lr: LrOption = 1e-3,
    min_lr: MinLrOption = None,
    warmup_steps: WarmupOption = None,
    weight_decay: WeightDecayOption = 0.1,
    clip_grad: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    save_every: SaveOption = 100,
    keep: Annotated[int, typer.Option(help="Newest checkpoints that are kept.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between lines where there is no terminal.")] = 10,
    seed: SeedOption = 1,
) -> None:
    """Plan, print the plan, train, and leave plan, metrics, plot and checkpoints in RUN.

    Several processes: `torchrun --nproc-per-node N -m nam56r train …`. Ctrl-C saves; `--resume` goes on. Exit code 3
    when the plan is refused.
    """
    from nam56r.plan import PlanRefused, kernels_named
    from nam56r.recipe import Recipe
    from nam56r.report import table
    from nam56r.train import Diverged, TrainOptions, run

    options = TrainOptions(
        recipe=Recipe.load(recipe).with_overrides(set_),
        data=data,
        out=out,
        steps=steps,
        resume=resume,
        kernels=kernels_named(kernel),
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
        outcome = run(options, show=lambda plan: typer.echo(table.render(plan, options.recipe, width())))
    except PlanRefused as refused:
        if first:
            typer.echo(table.render(refused.plan, options.recipe, width()))
        raise typer.Exit(REFUSED) from None
    except Diverged as diverged:
        typer.echo(f"nam56r: {one_line(diverged)}", err=True)
        raise typer.Exit(FAILED) from None
    if first:
        typer.echo(f"step {outcome.step}: LM loss {outcome.lm_loss:.4f}; {outcome.plot}; {outcome.checkpoint}")
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


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
