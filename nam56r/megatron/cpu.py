"""Megatron-core on a machine without a GPU: what it asks of torch.cuda, answered for the CPU.

Megatron-core builds some of its tensors on `torch.cuda.current_device()` and orders its work on CUDA streams even
where the backend is gloo. `cpu_mode` answers those few calls for the whole process, with the patches of scope "cpu".
It is entered explicitly, once, and says so in the log. What it can't answer is avoided by configuration (CPU
initialisation, the `allgather` dispatcher, no fusions) and by `engine`, which brings its own optimizer step.
"""

from __future__ import annotations

import logging
import os

import torch

from nam56r.megatron.patches import apply_patches, patches_of

logger = logging.getLogger(__name__)


def cpu_mode() -> None:
    """Answer torch.cuda for the CPU in this process, from now on. A second call does nothing.

    Raises RuntimeError when CUDA is already in use, or on a megatron-core version that the stand-ins aren't known for.
    """
    if is_on():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CPU mode: CUDA is already in use in this process: start another one for the CPU")
    apply_patches("cpu")
    if os.environ.get("RANK", "0") == "0":
        targets = ", ".join(patch.target for patch in patches_of("cpu"))
        logger.warning("CPU mode is on: Megatron runs on this CPU, with stand-ins for %s", targets)


def is_on() -> bool:
    """Whether this process is in CPU mode."""
    return all(patch.verify() for patch in patches_of("cpu"))
