"""An engine's state in Megatron's distributed checkpoints: weights, optimizer, schedule and generators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nam56r.megatron.engine import Engine
from nam56r.megatron.patches import apply_patches


def save(engine: Engine, folder: Path) -> None:
    """Write the engine's state into an empty folder. All ranks call it together; a shard is on disk when it returns."""
    apply_patches("checkpoint")
    dist_checkpointing.save(_state(engine, loading=False), str(folder))


def load(engine: Engine, folder: Path) -> None:
    """Put what `save` wrote into an engine of the same recipe, in place. Other data-parallel sizes can load it too."""
    apply_patches("checkpoint")
    state = dist_checkpointing.load(_state(engine, loading=True), str(folder))
    engine.model.load_state_dict(state["model"])
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.schedule.load_state_dict(state["schedule"])
    _set_generators(state["generators"])


def _state(engine: Engine, *, loading: bool) -> dict[str, Any]:
    model = engine.model.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}
    return {
        "model": model,
        "optimizer": engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "schedule": engine.schedule.state_dict(),
        "generators": ShardedObject(
            "generators",
            _generators(),
            (parallel_state.get_tensor_model_parallel_world_size(),),
            (parallel_state.get_tensor_model_parallel_rank(),),
            replica_id=parallel_state.get_data_parallel_rank(),
        ),
    }


def _generators() -> dict[str, Any]:
    """The states of every random generator; data-parallel ranks have the same."""
    cuda = torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
