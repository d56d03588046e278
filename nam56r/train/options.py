"""What a training run is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nam56r.decay import Decay
from nam56r.recipe import Recipe
from nam56r.records import explained

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# what a resumed run may change; the data set is compared by its contents
CHANGEABLE = frozenset({"data", "out", "resume", "steps", "save_every", "keep", "log_every"})


class TrainOptions(Decay):
    """A run. Raises ValueError of one line that names what is wrong.

    data          prefix of a data set that `nam56r data build` made
    out           the run's folder
    steps         updates in all, those before a resume included; the learning rate decays over them
    resume        continue the run in `out`
    kernels       operator -> the name of the kernel that must run it
    tp, ep        tensor- and expert-parallel sizes; the processes that are left are data-parallel
    micro_batch   sequences in one pass of one process
    global_batch  sequences in one update; None for one pass of every data-parallel process
    lr, min_lr    peak and final learning rate; min_lr None for a tenth of lr
    warmup_steps  linear warm-up from 0; None for a twentieth of the steps
    clip_grad     largest gradient norm
    save_every    steps between checkpoints; the last step is always saved
    keep          checkpoints that are kept, the newest
    log_every     steps between lines where there is no terminal to show a bar on
    """

    recipe: Recipe
    data: str
    out: Path
    steps: Count
    resume: bool = False
    kernels: dict[str, str] = {}
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tp: Count = 1
    ep: Count = 1
    micro_batch: Count = 1
    global_batch: Count | None = None
    lr: Positive = 1e-3
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip_grad: Positive = 1.0
    save_every: Count = 100
    keep: Count = 2
    log_every: Count = 10
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1

    def __init__(self, /, **values: Any):
        with explained(TrainOptions, "train"):
            super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if faults := "; ".join(self.decay_faults()):
            raise ValueError(faults)
        return self

    def microbatches(self, data_parallel: int) -> int:
        """Passes of one process in one update. Raises ValueError when global_batch can't be split so."""
        together = self.micro_batch * data_parallel
        wanted = self.global_batch or together
        if wanted % together:
            raise ValueError(
                f"global_batch = {wanted}, but must be a multiple of micro_batch · data-parallel processes = "
                f"{self.micro_batch} · {data_parallel}"
            )
        return wanted // together

    def record(self, **more: Any) -> dict[str, Any]:
        """What is written of a run, and compared when it is resumed: all but where it is and its recipe."""
        return self.model_dump(mode="json", exclude={"recipe", "out", "resume"}) | more
