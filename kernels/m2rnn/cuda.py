"""The binding to csrc/m2rnn: which shape needs which kernels, shapes for tracing, and the gradient."""

from __future__ import annotations

import functools

import torch
from torch.autograd.function import once_differentiable

from nam56r.kernels import extension, nvrtc
from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.registry import Device

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as m2rnn_load numbers them
NAMES = {torch.float32: "float", torch.float16: "nam56r::m2rnn::Float16", torch.bfloat16: "nam56r::m2rnn::BFloat16"}
COLUMNS = (16, 32, 64)
MOST_ROWS = 128


def chunk_of(keys: int, columns: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Steps between two saved states: as many as let a chunk's states lie in shared memory, at most 16.

    A chunk's tiles take 32 KiB where a block may have 227 KiB (compute capability 9 to 11), else 16 KiB. 0 when not even
    one step fits.
    """
    room = 32768 if 9 <= capability[0] <= 11 else 16384
    step = row_blocks(keys) * 16 * columns * (2 if dtype == torch.bfloat16 else 4)
    return next((chunk for chunk in (16, 8, 4, 2, 1) if chunk * step <= room), 0)


def row_blocks(keys: int) -> int:
    """Blocks of 16 rows that K rows fill."""
    return -(-keys // 16)


@functools.cache  # asked in every call
def built(keys: int, columns: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the extension holds code for this shape and device."""
    shapes = torch.ops.nam56r.m2rnn_built()
    shape = [ELEMENTS[dtype], columns, row_blocks(keys), chunk_of(keys, columns, dtype, capability)]
    ahead = any(shapes[i : i + 4] == shape for i in range(0, len(shapes), 4))
    return ahead and any(extension.covers(arch, capability) for arch in extension.archs())


@torch.compiler.assume_constant_result  # a traced program asks while it is traced
def refusal(keys: int, columns: int, dtype: torch.dtype, name: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """Why no code for this shape can be had on a device of that name; empty when it can."""
    return () if built(keys, columns, dtype, capability) else nvrtc.reason(name, capability)


@torch.compiler.assume_constant_result
def prepare(keys: int, columns: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Compile and load the kernels of a shape that isn't built ahead, once; gives the shape's chunk."""
    chunk = chunk_of(keys, columns, dtype, capability)
    if not built(keys, columns, dtype, capability):
        _load(row_blocks(keys), columns, chunk, dtype, capability)
    return chunk


@functools.cache
def _load(rows: int, columns: int, chunk: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    shape = f"<{NAMES[dtype]}, {columns}, {rows}, {chunk}>"
    kernels = [f"nam56r::m2rnn::{name}{shape}" for name in ("forward", "gradient", "products")]
    kernels.append(f"nam56r::m2rnn::reduce<{NAMES[dtype]}>")
    unit, cubin = nvrtc.compile("m2rnn", "kernels.cuh", kernels, nvrtc.arch_of(capability))
    code, names = torch.frombuffer(bytearray(cubin), dtype=torch.uint8), [unit.names[kernel] for kernel in kernels]
    arch = 10 * capability[0] + capability[1]
    torch.ops.nam56r.m2rnn_load(code, names, ELEMENTS[dtype], columns, rows, chunk, arch)


def m2rnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    forget: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nam56r.kernels.m2rnn.m2rnn`."""
    chunk = prepare(q.shape[3], v.shape[3], q.dtype, Device.of(q.device).capability)
    weight, forget = weight.float(), forget.float()
    initial_state = None if initial_state is None else initial_state.float()
    inputs = (q, k, v, weight, forget, initial_state)
    y, final_state, _ = torch.ops.nam56r.m2rnn_forward(*inputs, cu_seqlens, chunk, needs_gradient(*inputs))
    return y, final_state


def _sequences(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_shapes(q, k, v, weight, forget, initial_state, cu_seqlens, chunk, save_states):
    batches, length, heads, columns = v.shape
    sequences, keys = _sequences(q, cu_seqlens), q.shape[3]
    chunks = batches * -(-length // chunk) if cu_seqlens is None else length // chunk + sequences
    y, final_state = v.new_empty(v.shape), weight.new_empty(sequences, heads, keys, columns)
    return y, final_state, weight.new_empty(chunks if save_states else 0, heads, row_blocks(keys) * 16 * columns)


def _backward_shapes(dy, dfinal_state, q, k, v, weight, forget, states, cu_seqlens, chunk):
    dinitial_state = weight.new_empty(_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return *(t.new_empty(t.shape) for t in (q, k, v, weight, forget)), dinitial_state


def _save(ctx, inputs, output):
    q, k, v, weight, forget, initial_state, cu_seqlens, ctx.chunk, ctx.saved_states = inputs
    ctx.save_for_backward(q, k, v, weight, forget, output[2], cu_seqlens)
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


@once_differentiable
def _backward(ctx, dy, dfinal_state, _):
    if not ctx.saved_states:
        raise RuntimeError("m2rnn: the forward ran without saving states (save_states=False), so it has no gradient")
    q, k, v, weight, forget, states, cu_seqlens = ctx.saved_tensors
    *gradients, dinitial_state = torch.ops.nam56r.m2rnn_backward(
        dy, dfinal_state, q, k, v, weight, forget, states, cu_seqlens, ctx.chunk
    )
    return *gradients, dinitial_state if ctx.has_initial_state else None, None, None, None


REGISTERED = extension.has("m2rnn_forward", "m2rnn_backward", "m2rnn_built", "m2rnn_load")

if REGISTERED:
    torch.library.register_fake("nam56r::m2rnn_forward", _forward_shapes)
    torch.library.register_fake("nam56r::m2rnn_backward", _backward_shapes)
    torch.library.register_autograd("nam56r::m2rnn_forward", _backward, setup_context=_save)
