"""Where Triton kernels can run: the reasons why not, and Triton's interpreter, which runs them on a CPU.

The interpreter is for tests and debugging: it is slow, and in Triton 3.6 to 3.9 it computes bf16 `tl.dot` wrongly. So
on a CPU a Triton kernel runs only there, and only when it is asked for by name. It is switched on for a process, by
TRITON_INTERPRET=1 before Triton is imported, or for a block, by `interpreter`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language
import triton.runtime.interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from nam56r.kernels.registry import FAMILY, Problem, candidates, select

OLDEST = (8, 0)  # compute capability: bf16 products and asynchronous copies
LARGE = (9, 0)  # Hopper, with 227 KiB of shared memory a block; tiles for others mostly fit into 99
SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))  # which is what these capabilities have

_library = torch.library.Library("nam56r", "FRAGMENT")

_patch_tensor = triton.runtime.interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """Triton's own, and loops over bounds that a kernel computes: Triton reads a bound by int() of an array of one
    element, which NumPy takes from an array without dimensions only, from 2.5 on."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


# for good, not for a block: TRITON_INTERPRET=1 has none
triton.runtime.interpreter._patch_lang_tensor = _patch_lang_tensor


@torch.compiler.assume_constant_result  # a traced program asks while it is traced
def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter now."""
    return triton.knobs.runtime.interpret


def reason(problem: Problem) -> tuple[str, ...]:
    """Why no Triton kernel can serve the problem's device, present or planned for; empty when one can."""
    device = problem.device
    if device.type != "cuda":
        remedy = "set TRITON_INTERPRET=1 to run it in Triton's interpreter"
        return () if interpreted() else (f"a Triton kernel, but the device is {device.name}: {remedy}",)
    major, minor = device.capability
    return () if (major, minor) >= OLDEST else (f"{device.name} is sm_{major}{minor}, but it takes sm_80 or later",)


def register_operator(
    schema: str, run: Callable[..., Any], shapes: Callable[..., Any], autograd: Callable[..., Any] | None = None
) -> None:
    """Register torch.ops.nam56r.<schema's name>: run, by Triton's interpreter on a CPU; shapes, for tracing; autograd.

    Not by torch.library.custom_op and register_autograd, whose wrappers cost more on the host than the launches.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _library.impl(name, run, key)
    if autograd:
        _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"nam56r::{name}", shapes, lib=_library)


def block(size: int) -> int:
    """A block's extent for so many features or heads: a power of two, and at least what a product takes."""
    return max(16, triton.next_power_of_2(size))


@contextmanager
def interpreter() -> Iterator[None]:
    """In this block every Triton kernel of the package runs in Triton's interpreter, on tensors of any device.

    Triton decides that where a function is decorated. Functions that are decorated already, ours and those of Triton's
    own language, are replaced in their modules for the block. A kernel that a module holds under a name of that module
    is found; one kept in a list or a closure isn't.
    """
    if interpreted():
        yield
        return
    for operator in FAMILY:
        candidates(operator)  # imports every family: one that is imported in the block would stay interpreted
    kept = [(module, dict(vars(module))) for module in _modules()]
    replaced: dict[int, InterpretedFunction] = {}  # a function has one stand-in, under whatever names it goes
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        select.cache_clear()
        try:
            for module, names in kept:
                for name, value in names.items():
                    if isinstance(value, JITFunction):
                        setattr(module, name, replaced.setdefault(id(value), InterpretedFunction(value.fn)))
            yield
        finally:
            for module, names in kept:  # the interpreter leaves some of Triton's language patched, too
                vars(module).update(names)
            select.cache_clear()


def _modules() -> list[ModuleType]:
    """The modules that may hold Triton functions: the package's kernels and Triton's language."""
    packages = ("nam56r.kernels", "triton.language")
    return [module for name, module in list(sys.modules.items()) if name.startswith(packages)]
