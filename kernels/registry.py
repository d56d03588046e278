"""Which kernel runs an operator: devices, problems, kernels, selection.

A `Problem` is what a kernel is asked to do (operator, shapes, dtypes, options, device) without the data, so that
the plan can ask before a tensor exists. A `Kernel` answers with its reasons to refuse; none means that it can run.
`select` takes the first that can, in the order of the family's `support.py`, or raises `NoKernel` with every
candidate's reasons. Nothing else in the project decides which implementation runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

import nam56r.kernels

# operator -> the family folder that implements it
FAMILY = {
    "mla_attention": "mla",
    "latent_attention": "mla",
    "mla_queries": "mla",
    "mla_latents": "mla",
    "index_top_k": "dsa",
    "sparse_latent_attention": "dsa",
    "indexer_kl_loss": "dsa",
    "mamba2_scan": "mamba2",
    "mamba3_scan": "mamba3",
    "mamba3_step": "mamba3",
    "m2rnn": "m2rnn",
    "moe_experts": "moe",
    "linear_cross_entropy": "cross_entropy",
    "rms_norm": "norm",
    "causal_conv1d": "conv1d",
}


@dataclass(frozen=True)
class Device:
    """A machine a plan can be made for; it need not be present.

    memory_gib is what one device has, tflops its dense bf16 matrix rate (datasheet; None if unknown), gbs its
    memory bandwidth in GB/s.
    """

    name: str
    type: Literal["cpu", "cuda"]
    capability: tuple[int, int] | None = None
    memory_gib: float | None = None
    tflops: float | None = None
    gbs: float | None = None

    @classmethod
    def of(cls, device: torch.device | str) -> Device:
        """The record of a device that is present."""
        return _present(torch.device(device))


DEVICES = {
    device.name: device
    for device in (
        Device("cpu", "cpu"),
        Device("a100", "cuda", (8, 0), 80, 312, 2039),
        Device("h100", "cuda", (9, 0), 80, 989, 3350),
        Device("h200", "cuda", (9, 0), 141, 989, 4800),
        Device("b200", "cuda", (10, 0), 180, 2250, 8000),
    )
}


@functools.cache
def _present(device: torch.device) -> Device:
    if device.type != "cuda":
        return DEVICES["cpu"] if device.type == "cpu" else Device(device.type, "cpu")
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    for known in DEVICES.values():
        if known.name != "cpu" and known.name in properties.name.lower().replace(" ", ""):
            return Device(known.name, "cuda", (properties.major, properties.minor), memory, known.tflops, known.gbs)
    return Device(properties.name, "cuda", (properties.major, properties.minor), memory)


@dataclass(frozen=True)
class Spec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do: named tensors (as `Spec`, or None where left out) and options, on a device."""

    operator: str
    device: Device
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operator: str, /, device: Device | None = None, **arguments: Any) -> Problem:
        """From tensors, `Spec`s and plain hashable options; the device is the first tensor's unless given."""
        items = []
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                device = device or _present(value.device)
                value = Spec(tuple(value.shape), value.dtype)
            items.append((name, value))
        if device is None:
            raise ValueError(f"{operator}: no tensor among {sorted(arguments)}: name the device")
        return cls(operator, device, tuple(items))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.arguments:
            if key == name:
                return value
        raise KeyError(f"{self.operator} has no argument {name!r}: {[key for key, _ in self.arguments]}")

    @property
    def specs(self) -> dict[str, Spec]:
        """The tensors that are given, by name."""
        return {name: value for name, value in self.arguments if isinstance(value, Spec)}


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator.

    refuses(problem) gives the reasons why it can't run a problem; none means that it can.
    role: "fast" is chosen freely, though `triton…` on a CPU, which is interpreted, only by name; "development"
    (readable references) is chosen freely on a CPU, on CUDA only by name; "rounding" (inputs are rounded to fewer bits
    first) and "peer" (other projects' kernels, registered by the bench) only by name.
    """

    operator: str
    name: str
    run: Callable[..., Any]
    refuses: Callable[[Problem], tuple[str, ...]] = lambda problem: ()
    role: Literal["fast", "development", "rounding", "peer"] = "fast"

    def reasons(self, problem: Problem, *, by_name: bool) -> tuple[str, ...]:
        """Why this kernel won't be taken for the problem, its role included."""
        reasons, cpu = self.refuses(problem), problem.device.type == "cpu"
        interpreted = cpu and self.name.startswith("triton")
        if by_name or (self.role == "development" and cpu) or (self.role == "fast" and not interpreted):
            return reasons
        what = {
            "fast": "Triton's interpreter, which is for tests",
            "development": "a development kernel, slow on a GPU",
            "rounding": "its inputs are rounded to fewer bits",
            "peer": "another project's kernel",
        }[self.role]
        return (*reasons, f"{what}: it runs only when asked for by name ({self.operator}={self.name})")


class NoKernel(ValueError):
    """No kernel takes a problem. `reasons` has every candidate's, by name."""

    def __init__(self, problem: Problem, reasons: dict[str, tuple[str, ...]]):
        self.problem, self.reasons = problem, reasons
        listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
        super().__init__(f"{problem.operator}: no kernel on {problem.device.name} ({listed or 'none registered'})")


_extra: dict[str, tuple[Kernel, ...]] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel behind the family's own (the bench adds peers so). The same operator and name replaces."""
    others = tuple(k for k in _extra.get(kernel.operator, ()) if k.name != kernel.name)
    _extra[kernel.operator] = (*others, kernel)
    select.cache_clear()


def candidates(operator: str) -> tuple[Kernel, ...]:
    """Every kernel of an operator, best first."""
    if operator not in FAMILY:
        raise ValueError(f"unknown operator {operator!r}: one of {', '.join(sorted(FAMILY))}")
    # an imported family is an attribute: torch.compile can't trace an import
    support = getattr(getattr(nam56r.kernels, FAMILY[operator], None), "support", None)
    support = support or importlib.import_module(f"nam56r.kernels.{FAMILY[operator]}.support")
    return (*(k for k in support.KERNELS if k.operator == operator), *_extra.get(operator, ()))


@functools.lru_cache(maxsize=4096)
def select(problem: Problem, name: str | None = None) -> Kernel:
    """The first kernel that can run the problem, or the one of that name.

    Raises NoKernel with every candidate's reasons; ValueError when no kernel has the name.
    """
    kernels = candidates(problem.operator)
    if name is not None:
        kernels = tuple(k for k in kernels if k.name == name)
        if not kernels:
            known = ", ".join(k.name for k in candidates(problem.operator))
            raise ValueError(f"{problem.operator} has no kernel {name!r}: one of {known}")
    reasons = {}
    for kernel in kernels:
        reasons[kernel.name] = kernel.reasons(problem, by_name=name is not None)
        if not reasons[kernel.name]:
            return kernel
    raise NoKernel(problem, reasons)
