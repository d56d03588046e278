"""The training entry: options, the run, and the folder it leaves."""

from nam56r.train.options import TrainOptions
from nam56r.train.run import Diverged, Outcome, run

__all__ = ["Diverged", "Outcome", "TrainOptions", "run"]
