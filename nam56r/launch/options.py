"""What one run of a launch is asked to do: data, folder, length, learning rate. None of it is the model or the policy."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from nam56r.decay import Decay
from nam56r.recipe import Coefficient, Count, Index, Positive
from nam56r.records import explained, shown

# what a launch leaves in the run's folder
RECIPE, PROFILE, CONTRACT, SCRIPT = "recipe.yaml", "profile.yaml", "contract.json", "launch.sh"


class RunOptions(Decay):
    """A run. Raises ValueError of one line that names what is wrong.

    data          prefix of a data set that `nam56r data build` made
    out           the run's folder
    steps         updates in all, those before a resume included; the learning rate decays over them
    resume        continue the run in `out`
    lr, min_lr    peak and final learning rate; min_lr None for a tenth of lr
    warmup_steps  linear warm-up from 0; None for a twentieth of the steps
    save_every    steps between checkpoints
    log_every     steps between lines
    """

    data: str
    out: str
    steps: Count
    resume: bool = False
    lr: Positive = 1e-3
    min_lr: Coefficient | None = None
    warmup_steps: Index | None = None
    weight_decay: Coefficient = 0.1
    save_every: Count = 100
    log_every: Count = 10
    seed: Annotated[int, Field(strict=True, ge=1, lt=2**31)] = 1  # Megatron takes no 0

    def __init__(self, /, **values: Any):
        with explained(RunOptions, "launch"):
            super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> RunOptions:
        problems = []
        for name, path in (("data", self.data), ("out", self.out)):
            # bytes that aren't UTF-8 are lone surrogates here, and the contract's JSON can't hold them
            if not path or "\0" in path or any("\ud800" <= character <= "\udfff" for character in path):
                problems.append(f"{name} = {shown(path)}, but must be a path in UTF-8 without NUL characters")
        problems += self.decay_faults()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def folder(self) -> str:
        """`out` as a command line takes it: never mistaken for an option."""
        return _path(self.out)

    @property
    def prefix(self) -> str:
        """`data` as a command line takes it."""
        return _path(self.data)


def _path(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path
