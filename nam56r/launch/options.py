"""What one run of a launch is asked to do: data, folder, length, learning rate. None of it is the model or the policy."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nam56r.pattern import shown
from nam56r.recipe import Coefficient, Count, Index, Positive

# what a launch leaves in the run's folder
RECIPE, PROFILE, CONTRACT, SCRIPT = "recipe.yaml", "profile.yaml", "contract.json", "launch.sh"


class RunOptions(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 1

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = []
            for item in error.errors():
                key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
                lines.append(f"{key} = {shown(item['input'])}: {message}" if key else message)
            raise ValueError(f"launch: {'; '.join(lines)}") from None

    @model_validator(mode="after")
    def _check(self) -> RunOptions:
        for name, path in (("data", self.data), ("out", self.out)):
            if not path or "\0" in path:
                raise ValueError(f"{name} = {shown(path)}, but must be a path without NUL characters")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup}, but must be less than steps = {self.steps}")
        if self.final_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr}, but must not be more than lr = {self.lr}")
        return self

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def warmup(self) -> int:
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

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
