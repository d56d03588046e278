"""`nam56r plan` and `nam56r doctor`: what would run, and what could."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nam56r.cli.app import REFUSED, app
from nam56r.cli.options import JsonOption, KernelOption, RecipeOption, SetOption, device_named, pairs, width


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

    authored, target = Recipe.load(recipe).with_overrides(set_), device_named(device)
    try:
        made = make_plan(
            authored,
            target,
            kernels=pairs(kernel),
            micro_batch=micro_batch,
            tensor_parallel=tp,
            dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
        )
    except PlanRefused as refused:
        made = refused.plan
    typer.echo(json.dumps(made.to_json(), indent=1) if as_json else table.render(made, authored, width()))
    if not made.accepted:
        raise typer.Exit(REFUSED)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what every slot could run on here and on an H200."""
    from nam56r import doctor

    found = doctor.examine()
    typer.echo(json.dumps(found, indent=1) if as_json else doctor.render(found, width()))
