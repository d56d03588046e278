"""Options that several commands share, and what they are read as."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nam56r.kernels.registry import Device

RecipeOption = Annotated[str, typer.Option(metavar="NAME|PATH", help="A named recipe or a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")]
KernelOption = Annotated[
    list[str], typer.Option("--kernel", metavar="OPERATOR=NAME", help="Take this kernel for an operator.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def width() -> int:
    return shutil.get_terminal_size().columns


def device_named(name: str) -> Device:
    import torch

    from nam56r.kernels.registry import DEVICES, Device

    if name == "here":
        return Device.of("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise ValueError(f"--device is {name!r}, but must be here or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def pairs(settings: Iterable[str]) -> dict[str, str]:
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
