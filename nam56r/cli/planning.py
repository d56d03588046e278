"""`nam56r plan`, `nam56r doctor` and `nam56r patches`: what would run, what could, and on what changes to Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nam56r.cli.app import FAILED, REFUSED, app, one_line
from nam56r.cli.options import JsonOption, KernelOption, RecipeOption, SetOption, device_named, width


@app.command()
def plan(
    recipe: RecipeOption = "nam56r",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, a100, h100, h200, b200, or here.")] = "here",
    set_: SetOption = [],
    kernel: KernelOption = [],
    micro_batch: Annotated[int, typer.Option(help="Sequences in one pass.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size.")] = 1,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the plan as one HTML page, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which kernel every slot would run, and why. Exit code 3 when a slot has none.

    The device need not be present. Activations are bf16 on a GPU, fp32 on a CPU.
    """
    import torch

    from nam56r.plan import PlanRefused, kernels_named, make_plan
    from nam56r.recipe import Recipe
    from nam56r.report import page, table

    authored, target = Recipe.load(recipe).with_overrides(set_), device_named(device)
    try:
        made = make_plan(
            authored,
            target,
            kernels=kernels_named(kernel),
            micro_batch=micro_batch,
            tensor_parallel=tp,
            dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
        )
    except PlanRefused as refused:
        made = refused.plan
    if html:
        html.write_text(page.render(made, authored, target), encoding="utf-8")
    typer.echo(json.dumps(made.to_json(), indent=1) if as_json else table.render(made, authored, width()))
    if not made.accepted:
        raise typer.Exit(REFUSED)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what every slot could run on here and on an H200."""
    from nam56r import doctor

    found = doctor.examine()
    typer.echo(json.dumps(found, indent=1) if as_json else doctor.render(found, width()))


@app.command()
def patches(as_json: JsonOption = False) -> None:
    """List what is changed in Megatron and torch at run time, and why.

    Every patch is tried in a new process: not in force before, in force after. Exit code 3 when one isn't.
    """
    from nam56r.report import patches

    try:
        found = patches.examine()
    except RuntimeError as error:
        typer.echo(f"nam56r: {one_line(error)}", err=True)
        raise typer.Exit(FAILED) from None
    typer.echo(json.dumps(found, indent=1) if as_json else patches.render(found, width()))
    if not all(patch["verified"] for patch in found["patches"]):
        raise typer.Exit(REFUSED)
