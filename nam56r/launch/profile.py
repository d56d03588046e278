"""Launcher profiles: where a recipe runs and how it is split, apart from what the model is.

A profile is frozen plain data; `PROFILES` has those that are named. It loads from and saves to YAML, and
`with_overrides` changes it by keys. What a profile leaves out of the layout is taken from the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nam56r import records
from nam56r.kernels.registry import DEVICES
from nam56r.recipe import Index, Layer, Name, Positive
from nam56r.records import Frozen, shown

MOST = 2**20
Size = Annotated[int, Field(strict=True, ge=1, le=MOST)]
Entry = Literal["pretrain", "train"]
CudaGraphs = Literal["none", "local", "transformer_engine", "full_iteration"]
Precision = Literal["bf16", "fp16", "fp32"]
OPEN = ("environment", "kernels")  # sections whose keys are the operator's own
HOST_PORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLES = {
    "propertyNames": {"pattern": f"^{VARIABLE.pattern}$"},
    "additionalProperties": {"type": ["string", "number"]},
}

# what an environment variable may be for, in the order in which they are set
ENVIRONMENT = {
    "cache": re.compile(r"\w+_CACHE_(DIR|PATH)"),
    "allocator": re.compile(r"PYTORCH_(CUDA_)?ALLOC_CONF"),
    "communication": re.compile(r"(TORCH_)?NCCL_\w+|GLOO_\w+|UCX_\w+"),
    "CUDA": re.compile(r"CUDA_\w+|CUBLAS_WORKSPACE_CONFIG"),
    "host": re.compile(r"OMP_NUM_THREADS|PYTHONUNBUFFERED|TORCH_LOGS|TORCH_CPP_LOG_LEVEL"),
}
# what a run doesn't inherit: it decides mathematics, is read before a variable above, is torchrun's (PET_…), or takes out
# Megatron's assertions; names, and prefixes with a *
NOT_INHERITED = (
    "PYTHONOPTIMIZE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_F32_DEFAULT",
    "TRITON_INTERPRET",
    "CUPY_ACCELERATORS",
    "CUPY_TF32",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUBLAS*",
    "MAMBA_*",
    "NVTE_*",
    "PET_*",
    "PYTORCH_*",
)


def purpose(variable: str) -> str | None:
    """Which of ENVIRONMENT's purposes a variable has; None for one that a profile may not set."""
    return next((name for name, pattern in ENVIRONMENT.items() if pattern.fullmatch(variable)), None)


def _text(value: Any) -> Any:
    """YAML reads NCCL_IB_DISABLE: 1 as a number; the environment has text only."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Guards(Frozen):
    """What stops or tames a step that goes wrong."""

    clip_grad: Positive = 1.0
    """Largest gradient norm."""
    check_nan: Annotated[bool, Field(strict=True)] = True
    """Stop at a loss or a gradient that is no number. CUDA graphs over the whole iteration can't."""
    loss_scale: Positive | None = None
    """fp16 only: a constant loss scale; None for Megatron's dynamic one."""


class LauncherProfile(Frozen):
    """Where and how a recipe is launched. Raises ValueError of one line that names every key at fault."""

    name: Name
    device: Annotated[str, Field(json_schema_extra={"enum": list(DEVICES)})] = "h200"
    """A name of `registry.DEVICES`; it need not be present to make a contract."""
    nodes: Size = 1
    gpus_per_node: Size = 1
    """Processes on each node, one a GPU; on a CPU, processes."""
    rendezvous: Annotated[str | None, Field(json_schema_extra={"pattern": f"^{HOST_PORT.pattern}$"})] = None
    """HOST:PORT where the nodes meet; needed with more than one."""
    entry: Entry = "pretrain"
    """pretrain: Megatron's own training loop on our stack spec. train: `nam56r train`, without pipeline."""

    layout: str | None = None
    """All layers with | between pipeline stages; None splits them evenly over pp · vpp."""
    depth: Size | None = None
    """Layers, r_layer_indices, dsa_ranks and mtp_depths: None takes the recipe's; another value than its is refused."""
    r_layer_indices: tuple[Layer, ...] | None = None
    dsa_ranks: tuple[Index, ...] | None = None
    mtp_depths: Index | None = None

    tp: Size = 1
    """Tensor-parallel size, with sequence parallelism where it is more than 1."""
    pp: Size = 1
    """Pipeline-parallel size."""
    vpp: Size = 1
    """Virtual stages of each pipeline rank: pipeline segments / pp."""
    ep: Size = 1
    """Expert-parallel size."""
    cp: Size = 1
    """Context-parallel size."""

    micro_batch: Size = 1
    """Sequences in one pass of one data-parallel process."""
    global_batch: Size = 1
    """Sequences in one update."""

    sparse_mode: Literal["sparse", "warmup"] = "sparse"
    """What DSA's indexer is trained over: the keys it selected, or (warmup) all of them."""
    cuda_graphs: CudaGraphs = "none"
    """Megatron's --cuda-graph-impl."""
    recompute: Literal["none", "full"] = "none"
    """full: each layer keeps its input and computes the rest again in the backward."""
    precision: Precision = "bf16"
    distributed_optimizer: Annotated[bool, Field(strict=True)] = True
    """Share the optimizer's state over the data-parallel processes."""
    guards: Guards = Guards()

    environment: Annotated[dict[str, Annotated[str, BeforeValidator(_text)]], Field(json_schema_extra=_VARIABLES)] = {}
    """Variables by name; {run} in a value is the run's folder. Caches, allocator, communication, CUDA, threads: no other."""
    kernels: dict[str, str] = {}
    """Operator -> the name of the kernel that must run it."""

    def __init__(self, /, **values: Any):
        with records.explained(LauncherProfile, f"profile {shown(values.get('name', 'without a name'))}"):
            super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> LauncherProfile:
        problems = []
        if self.device not in DEVICES:
            problems.append(f"device = {shown(self.device)}, but must be one of {', '.join(DEVICES)}")
        if self.rendezvous is not None and not HOST_PORT.fullmatch(self.rendezvous):
            problems.append(f"rendezvous = {shown(self.rendezvous)}, but must be HOST:PORT, such as node0:29500")
        for name, value in self.environment.items():
            if not VARIABLE.fullmatch(name):
                problems.append(f"environment: {shown(name)} is no variable's name: letters, digits and _ only")
            if "\0" in value:
                problems.append(f"environment.{name} has a NUL character: take it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @field_validator("environment")
    @classmethod
    def _in_order(cls, environment: dict[str, str]) -> dict[str, str]:
        """By purpose; variables that a profile may not set come last, and a check refuses them by name."""
        order = [*ENVIRONMENT, None]
        return dict(sorted(environment.items(), key=lambda item: order.index(purpose(item[0]))))

    @property
    def processes(self) -> int:
        """Of all nodes together."""
        return self.nodes * self.gpus_per_node

    @classmethod
    def load(cls, name_or_path: str | Path) -> LauncherProfile:
        """A preset by name, or a YAML file by path. Raises ValueError of one line."""
        return records.load(cls, "profile", name_or_path, PROFILES)

    def save(self, path: str | Path) -> None:
        """Write every value as YAML; `load` gives an equal profile."""
        records.save(self, path)

    def with_overrides(self, settings: Iterable[str]) -> LauncherProfile:
        """A profile with "key=value" settings applied, values read as YAML ("tp=2", "environment.NCCL_DEBUG=INFO").

        null takes a variable or a kernel out. Raises ValueError of one line; an unknown key is answered with the nearest.
        """
        values = self.model_dump()
        for said, key, value in records.assignments("--policy", settings, "tp=2"):
            section, dot, last = key.rpartition(".")
            target = values.get(section) if dot else values
            if not isinstance(target, dict) or (last not in target and section not in OPEN):
                raise ValueError(f"{said}: {records.unknown(LauncherProfile, key)}")
            if isinstance(target.get(last), dict):
                raise ValueError(f"{said}: {last} is a section: set one of its keys, such as {last}.KEY=VALUE")
            target[last] = value
            if section in OPEN and value is None:
                del target[last]
        return LauncherProfile(**values)


_CACHES = {
    "TRITON_CACHE_DIR": "{run}/cache/triton",
    "TORCHINDUCTOR_CACHE_DIR": "{run}/cache/inductor",
}
_CPU = _CACHES | {"OMP_NUM_THREADS": "1"}
_H200 = _CACHES | {
    "NAM56R_CACHE_DIR": "{run}/cache/nam56r",
    "CUDA_CACHE_PATH": "{run}/cache/cuda",
    # torch 2.11 reads PYTORCH_CUDA_ALLOC_CONF first, if it is set, and then this one
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "8",
}
_NODE = _H200 | {
    "NCCL_DEBUG": "WARN",
    "NCCL_NVLS_ENABLE": "0",  # its multicast buffers take device memory
}
_PRESETS = (
    LauncherProfile(name="h200", entry="train", global_batch=16, environment=_H200),
    LauncherProfile(name="h200-x2", entry="train", gpus_per_node=2, ep=2, global_batch=32, environment=_NODE),
    # published: TP 1, PP 2, VPP 2, EP 1, micro 4, global 64, MTP 2, CUDA graphs on. Which implementation isn't said.
    LauncherProfile(
        name="h200-x8",
        gpus_per_node=8,
        pp=2,
        vpp=2,
        micro_batch=4,
        global_batch=64,
        mtp_depths=2,
        cuda_graphs="local",
        environment=_NODE | {"NCCL_GRAPH_REGISTER": "0"},
    ),
    # published: TP 1, PP 1, EP 4, micro 8, BF16, graphs off. Global batch and recompute aren't said: recompute is ours,
    # for memory.
    LauncherProfile(
        name="h200-x8-record",
        gpus_per_node=8,
        ep=4,
        micro_batch=8,
        global_batch=64,
        recompute="full",
        environment=_NODE,
    ),
    LauncherProfile(
        name="cpu",
        device="cpu",
        entry="train",
        precision="fp32",
        distributed_optimizer=False,
        environment=_CPU,
    ),
    LauncherProfile(
        name="cpu-x2",
        device="cpu",
        gpus_per_node=2,
        entry="train",
        global_batch=2,
        precision="fp32",
        distributed_optimizer=False,
        environment=_CPU,
    ),
)
PROFILES = {profile.name: profile for profile in _PRESETS}
