"""Megatron-core on a machine without a GPU: what it asks of torch.cuda, answered for the CPU.

Megatron-core builds some of its tensors on `torch.cuda.current_device()` and orders its work on CUDA streams even
where the backend is gloo. `cpu_mode` answers those few calls for the whole process. It is entered explicitly, once,
and says so in the log. What it can't answer is avoided by configuration (CPU initialisation, the `allgather`
dispatcher, no fusions) and by `engine`, which brings its own optimizer step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from nam56r.megatron.patches import VERSIONS, Patch, apply_patches

logger = logging.getLogger(__name__)


class _Stream:
    """A stream on which everything is done already."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def _stand_in(function: str, answer: Callable[..., Any], reason: str) -> Patch:
    return Patch(
        f"cpu-{function.replace('_', '-').lower()}",
        f"torch.cuda.{function}",
        reason,
        VERSIONS,
        lambda: setattr(torch.cuda, function, answer),
        lambda: getattr(torch.cuda, function) is answer,
    )


STAND_INS = (
    _stand_in(
        "current_device",
        lambda: torch.device("cpu"),
        "DDP's gradient buffers, the router's counters and the loss trackers are made on the current device",
    ),
    _stand_in(
        "current_stream", lambda device=None: _Stream(), "DDP reads the current stream before it reduces gradients"
    ),
    _stand_in("Stream", _Stream, "shared experts make a side stream when they are built"),
    _stand_in("synchronize", lambda device=None: None, "distributed checkpointing waits for copies from the device"),
    Patch(
        "cpu-eager",
        "torch.compile",
        "Megatron compiles small pointwise functions; here that takes half a minute, a C++ compiler, and gains nothing",
        VERSIONS,
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: _stance().stance == "force_eager",
    ),
)


def _stance() -> Any:
    return torch._dynamo.eval_frame._stance


def cpu_mode() -> None:
    """Answer torch.cuda for the CPU in this process, from now on. A second call does nothing.

    Raises RuntimeError when CUDA is already in use, or on a megatron-core version that the stand-ins aren't known for.
    """
    if is_on():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CPU mode: CUDA is already in use in this process: start another one for the CPU")
    apply_patches(STAND_INS)
    if os.environ.get("RANK", "0") == "0":
        names = ", ".join(patch.target for patch in STAND_INS)
        logger.warning("CPU mode is on: Megatron runs on this CPU, with stand-ins for %s", names)


def is_on() -> bool:
    """Whether this process is in CPU mode."""
    return all(patch.verify() for patch in STAND_INS)
