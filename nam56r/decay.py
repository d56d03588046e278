"""The learning rate of a run, which both entries are asked for in the same terms."""

from __future__ import annotations

from collections.abc import Iterator

from nam56r.records import Frozen


class Decay(Frozen):
    """Linear warm-up from 0 to lr, then decay to min_lr at `steps`. Subclasses bound the fields.

    min_lr        None for a tenth of lr
    warmup_steps  None for a twentieth of the steps
    """

    steps: int
    lr: float = 1e-3
    min_lr: float | None = None
    warmup_steps: int | None = None

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def warmup(self) -> int:
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    def decay_faults(self) -> Iterator[str]:
        """What doesn't fit together."""
        if self.warmup >= self.steps:
            yield f"warmup_steps = {self.warmup}, but must be less than steps = {self.steps}"
        if self.final_lr > self.lr:
            yield f"min_lr = {self.min_lr}, but must not be more than lr = {self.lr}"
