"""Options that several commands share, and what they are read as."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nam56r.kernels.registry import Device

RecipeOption = Annotated[str, typer.Option(metavar="NAME|PATH", help="A named recipe or a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")]
KernelOption = Annotated[
    list[str], typer.Option("--kernel", metavar="OPERATOR=NAME", help="Take this kernel for an operator.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in RUN.")]
LrOption = Annotated[float, typer.Option(help="Peak learning rate.")]
MinLrOption = Annotated[float | None, typer.Option(help="Final learning rate; by default a tenth of the peak.")]
WarmupOption = Annotated[int | None, typer.Option(help="Linear warm-up; by default a twentieth of the steps.")]
WeightDecayOption = Annotated[float, typer.Option(help="AdamW's.")]
SaveOption = Annotated[int, typer.Option(help="Steps between checkpoints.")]
SeedOption = Annotated[int, typer.Option(help="Of weights and data order.")]
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
