"""Which code of csrc/ssd a shape needs: built ahead, or compiled with NVRTC at first use; why none can be had."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from nam56r.kernels import extension, nvrtc

DTYPES = {torch.bfloat16: ("bf16", "BFloat16"), torch.float16: ("fp16", "Float16")}
CAPABILITY = (9, 0)  # its kernels are made of wgmma, which later devices lack
ROOM = 227 * 1024  # bytes of shared memory that a block may have there
RANKS, HEADDIMS, STATES = (1, 2, 4, 8), (32, 64, 128), (32, 64, 128, 256)
PASSES = ("forward",), ("turns", "walk", "gradient")  # what is compiled together
MAPPED = ("forward", "walk")  # what fetches boxes by TMA, of maps that a launch makes
THREADS = {"forward": 256, "turns": 128, "walk": 256, "gradient": 512}  # of a block
REGISTERED = extension.has("ssd_built", "ssd_kernel", "ssd_load", "ssd_shared", "ssd_launch")


class Shape(NamedTuple):
    """What code is compiled for; any P runs on the same code."""

    dtype: torch.dtype
    model: int
    rank: int
    d_state: int


class Code(NamedTuple):
    """A loaded kernel, and what a block of it takes."""

    handle: int
    threads: int
    shared: int


def name_of(kernel: str, shape: Shape) -> str:
    """As ssd_built names it."""
    dtype, *numbers = shape
    return f"{kernel}<{DTYPES[dtype][0]},{','.join(map(str, numbers))}>"


def shared_bytes(kernel: str, shape: Shape) -> int:
    """Shared memory of a block."""
    return torch.ops.nam56r.ssd_shared(kernel, *shape[1:])


@functools.cache
def built(kernels: tuple[str, ...], shape: Shape, capability: tuple[int, int]) -> bool:
    """Whether the extension holds these kernels for this shape and device."""
    ahead = set(torch.ops.nam56r.ssd_built()) >= {name_of(kernel, shape) for kernel in kernels}
    return ahead and capability == CAPABILITY and "90a" in extension.archs()


@torch.compiler.assume_constant_result  # a traced program asks while it is traced
def refusal(shape: Shape, name: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """Why no code for this shape can be had on a device of that name; empty when it can."""
    large = [kernel for kernels in PASSES for kernel in kernels if shared_bytes(kernel, shape) > ROOM]
    if large:
        asked = f"R = {shape.rank}, N = {shape.d_state}"
        return (f"{asked} takes more shared memory than {name} has ({', '.join(large)})",)
    if all(built(kernels, shape, capability) for kernels in PASSES):
        return ()
    return nvrtc.reason(name, capability)


@functools.cache
def code(kernels: tuple[str, ...], shape: Shape, capability: tuple[int, int]) -> dict[str, Code]:
    """The kernels of one pass by name, compiled first where they aren't built ahead."""
    if built(kernels, shape, capability):
        handles = [torch.ops.nam56r.ssd_kernel(name_of(kernel, shape)) for kernel in kernels]
    else:
        dtype = f"nam56r::{DTYPES[shape.dtype][1]}"
        numbers = ", ".join(map(str, shape[1:]))
        names = [f"nam56r::ssd::{kernel}<{dtype}, {numbers}>" for kernel in kernels]
        unit, cubin = nvrtc.compile("ssd", "kernels.cuh", names, nvrtc.arch_of(capability))
        content = torch.frombuffer(bytearray(cubin), dtype=torch.uint8)
        handles = torch.ops.nam56r.ssd_load(content, [unit.names[name] for name in names])
    return {kernel: Code(h, THREADS[kernel], shared_bytes(kernel, shape)) for kernel, h in zip(kernels, handles)}
