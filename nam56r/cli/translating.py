"""`nam56r translate`: what of a recipe Megatron can say, and with which flags."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nam56r.cli.app import REFUSED, app
from nam56r.cli.options import JsonOption, RecipeOption, SetOption, width


@app.command()
def translate(
    recipe: RecipeOption = "nam56r",
    set_: SetOption = [],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse every seam.")] = False,
    layout: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="All layers, with | between pipeline stages.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Lower a recipe to Megatron's symbols and flags, and list what stays custom. Exit code 3 when it is refused."""
    from nam56r.recipe import Recipe
    from nam56r.report import translation
    from nam56r.translate import megatron_args
    from nam56r.translate import translate as lower

    authored = Recipe.load(recipe).with_overrides(set_)
    lowered = lower(authored, strict=strict, layout=layout)
    bundle = megatron_args(authored, lowered) if lowered.accepted else None
    if as_json:
        typer.echo(json.dumps(lowered.to_json() | {"args": bundle.args if bundle else None}, indent=1))
    else:
        typer.echo(translation.render(lowered, bundle, width()))
    if not lowered.accepted:
        raise typer.Exit(REFUSED)
