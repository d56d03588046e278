"""What the device has noticed and the host may learn later: whether an index score was NaN.

A kernel that meets one sets a flag in device memory, so that nothing waits, in a captured graph neither. The training
loop reads it where it waits for the device anyway.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def flag(device: torch.device) -> torch.Tensor:
    """[1] int32, of a device; not 0 when a score was NaN since `nan_scores` was last asked."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("index_top_k: run it once before it is captured, for its status flag must outlive the graph")
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device=device)


def nan_scores(device: torch.device | str) -> bool:
    """Whether `index_top_k` met a score that is NaN on the device since this was last asked. Waits for the device."""
    device = torch.empty(0, device=device).device  # with its number
    found = flag(device).item() != 0
    flag(device).zero_()
    return found
