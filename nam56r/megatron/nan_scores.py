"""Index scores that were NaN end a run at its next log point: a kernel that meets one sets a flag on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nam56r.kernels.dsa.status import flag, nan_scores

MESSAGE = "an index score of sparse attention is NaN"


def on_any_rank(device: torch.device) -> bool:
    """Whether any process met one since this was last asked: the same on all, which must ask together. Waits."""
    torch.distributed.all_reduce(flag(device), op=torch.distributed.ReduceOp.MAX)
    return nan_scores(device)


def stopping(training_log: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's training_log, which every process calls after every iteration, that raises RuntimeError on all of them
    where it logs and any met one."""

    @functools.wraps(training_log)
    def log(loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *rest: Any, **named: Any) -> Any:
        from megatron.training import get_args

        report = training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
        interval = get_args().log_interval
        if iteration % interval == 0 and on_any_rank(torch.empty(0, device=torch.cuda.current_device()).device):
            raise RuntimeError(f"{MESSAGE}, in one of the last {interval} iterations")
        return report

    return log
