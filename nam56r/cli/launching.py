"""`nam56r launch`: the contract of a run, and the run."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from nam56r.cli.app import REFUSED, app
from nam56r.cli.options import (
    JsonOption,
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
def launch(
    recipe: RecipeOption = "nam56r",
    profile: Annotated[str, typer.Option(metavar="NAME|PATH", help="A named profile or a YAML file.")] = "h200",
    data: Annotated[str | None, typer.Option(metavar="PREFIX", help="What `nam56r data build` wrote.")] = None,
    out: Annotated[str | None, typer.Option(metavar="RUN", help="The run's folder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates in all, those before a resume included.")] = None,
    set_: SetOption = [],
    policy: Annotated[list[str], typer.Option("--policy", metavar="KEY=VALUE", help="Change a profile's value.")] = [],
    kernel: KernelOption = [],
    entry: Annotated[
        Literal["pretrain", "train"] | None,
        typer.Option(help="Megatron's own loop, or `nam56r train`; by default the profile's."),
    ] = None,
    resume: ResumeOption = False,
    lr: LrOption = 1e-3,
    min_lr: MinLrOption = None,
    warmup_steps: WarmupOption = None,
    weight_decay: WeightDecayOption = 0.1,
    save_every: SaveOption = 100,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    seed: SeedOption = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse every seam of the translation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the contract; write and run nothing.")] = False,
    as_json: JsonOption = False,
    as_script: Annotated[bool, typer.Option("--script", help="Print the shell script only.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a profile, and end.")] = False,
) -> None:
    """Check a launch as a whole, print its contract, and run it. Exit code 3 when it is refused.

    With --dry-run the data and the profile's device need not be there. Without it RUN gets recipe.yaml, profile.yaml,
    contract.json and launch.sh, torchrun runs, and the exit code is its own.
    """
    from nam56r.launch import LauncherProfile, LaunchRefused, RunOptions, make_contract, shell, start
    from nam56r.plan import kernels_named
    from nam56r.recipe import Recipe
    from nam56r.report.launch import render

    if schema:
        typer.echo(json.dumps(LauncherProfile.model_json_schema(), indent=1))
        return
    missing = [name for name, value in (("--data", data), ("--out", out), ("--steps", steps)) if value is None]
    if missing:
        raise ValueError(f"launch also needs {', '.join(missing)}")
    if as_json and as_script:
        raise ValueError("--json and --script exclude each other: take one")
    if (as_json or as_script) and not dry_run:
        raise ValueError("--json and --script print a contract and run nothing: they go with --dry-run")

    settings = [
        *policy,
        *(f"kernels.{operator}={json.dumps(name)}" for operator, name in kernels_named(kernel).items()),
    ]
    settings += [f"entry={entry}"] if entry else []
    run = RunOptions(
        data=data,
        out=out,
        steps=steps,
        resume=resume,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
    )
    try:
        contract = make_contract(
            Recipe.load(recipe).with_overrides(set_),
            LauncherProfile.load(profile).with_overrides(settings),
            run,
            strict=strict,
            here=not dry_run,
        )
    except LaunchRefused as refused:
        contract = refused.contract
    if as_json:
        typer.echo(contract.model_dump_json(indent=1))
    elif as_script and contract.accepted:
        typer.echo(shell(contract), nl=False)
    else:
        # a refused contract has no script: standard output stays empty, so that nothing can run by mistake
        typer.echo(render(contract, width()), err=as_script)
    if not contract.accepted:
        raise typer.Exit(REFUSED)
    if not dry_run:
        raise typer.Exit(start(contract))
