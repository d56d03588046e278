"""Processes, groups and seeds: one process alone, or what torchrun started; NCCL on CUDA, gloo on a CPU."""

from __future__ import annotations

import os
import random
from typing import Literal

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nam56r.megatron.cpu import cpu_mode


def initialize(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    seed: int = 0,
) -> torch.device:
    """Join the process group, build Megatron's groups, seed every generator; returns this process's device.

    Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment) it joins the others; otherwise it is a world of
    one, which needs no port. On a CPU it enters `cpu_mode` first. tp, pp, ep: tensor-, pipeline- and expert-parallel
    sizes; vpp: pipeline segments of one process, None for one. Raises ValueError when they don't divide the number of processes, or when CUDA is asked for and isn't there.
    """
    rank, processes = world()
    data_parallel(tp=tp, pp=pp, ep=ep)
    place = pick_device(device)
    cuda = place.type == "cuda"
    if cuda:
        torch.cuda.set_device(place)
    else:
        cpu_mode()
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=processes,
        # the environment names the meeting point where torchrun started us
        store=None if "WORLD_SIZE" in os.environ else torch.distributed.HashStore(),
        device_id=place if cuda else None,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # On a CPU there is no CUDA generator to track: Megatron's inference tracker forks nothing, and weights are drawn
    # from the default generator.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not cuda, force_reset_rng=True)
    return place


def world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun set them: 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel(*, tp: int = 1, pp: int = 1, ep: int = 1) -> int:
    """The data-parallel size that is left. Raises ValueError when the sizes don't divide the number of processes."""
    _, processes = world()
    for name, size in (("tp", tp), ("pp", pp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"{name} is {size}, but must be at least 1")
    if processes % (tp * pp) or processes % (ep * pp):
        raise ValueError(
            f"tp {tp} · pp {pp} and ep {ep} · pp {pp} must divide the number of processes, {processes}: "
            "start more with torchrun, or lower them"
        )
    return processes // (tp * pp)


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This process's device: CUDA where there is one, unless the CPU is asked for."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, but must be 'auto', 'cpu' or 'cuda'")
    there = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("device is 'cuda', but torch finds no CUDA device here: ask for 'cpu', or 'auto'")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if there else torch.device("cpu")


def destroy() -> None:
    """Leave the groups; `initialize` can be called again."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
