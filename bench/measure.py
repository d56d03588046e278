"""Times one case on CUDA: ours, then its peers, in one process, one after the other."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.testing

from bench.record import Record, record
from nam56r.kernels.registry import DEVICES, Device, NoKernel
from nam56r.kernels.testing import error, flatten


@dataclass(frozen=True)
class Measured:
    """ms is a median; peak_mib is above what was allocated before; first_call_s holds all compiling."""

    ms: float
    peak_mib: float
    first_call_s: float


def measured(call: Callable[[], Any]) -> Measured:
    """Time a call on the current CUDA device: do_bench's median, with the L2 cache flushed before each run.

    100 ms pass first: in a device's first milliseconds of work its clocks are above those that power then allows.
    The call is replayed from a CUDA graph: the device's time, not Python's. What can't be captured is called instead,
    with a warning that says so.
    """
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    ms = triton.testing.do_bench(captured(call), warmup=100, rep=200, return_mode="median")
    return Measured(ms, peak, first)


def on_the_host(call: Callable[[], Any], times: int = 1000) -> Measured:
    """Seconds of Python and launches per eager call, for a problem so small that the device waits: the mean."""
    first = measured(call)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return Measured((time.perf_counter() - began) / times * 1e3, first.peak_mib, first.first_call_s)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a graph's replay, or itself where capture fails."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"timed without a graph, launches included: {str(error).splitlines()[0]}", stacklevel=2)
        return call
    return graph.replay


def passes(run: Callable[[str], Any], kernel: str, grad: Sequence[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The calls to time: "fwd" without autograd, and "fwd+bwd" when there is something to differentiate by."""

    def forward() -> Any:
        with torch.no_grad():
            return run(kernel)

    weights: list[torch.Tensor] = []

    def both() -> Any:
        outputs = [t for t in flatten(run(kernel)) if t.requires_grad]
        if not weights:
            weights.extend(torch.randn_like(t) for t in outputs)
        return torch.autograd.grad(outputs, grad, weights, allow_unused=True)

    return {"fwd": forward, "fwd+bwd": both} if grad else {"fwd": forward}


def floors(device: str, flops: Mapping[str, float], moved: Mapping[str, float]) -> dict[str, float]:
    """The least time in ms by pass, at the datasheet's rates; empty for a device whose rates aren't known."""
    known = DEVICES.get(device)
    if known is None or not known.tflops or not known.gbs:
        return {}
    return {
        passed: max(flops.get(passed, 0) / known.tflops / 1e9, moved.get(passed, 0) / known.gbs / 1e6)
        for passed in flops.keys() | moved.keys()
    }


def case(
    op: str,
    name: str,
    kernel: str,
    run: Callable[[str], Any],
    *,
    grad: Sequence[torch.Tensor] = (),
    flops: Mapping[str, float] | None = None,
    moved: Mapping[str, float] | None = None,
    floor_ms: Mapping[str, float] | None = None,
    peers: Iterable[str] = (),
    timer: Callable[[Callable[[], Any]], Measured] = measured,
    device: str | None = None,
) -> tuple[list[Record], dict[str, str]]:
    """Measure run(kernel) and run(peer) for every peer; records of all, and why a peer has none.

    flops, moved (bytes) and floor_ms are by pass; without floor_ms the floor is the larger time of flops and moved at
    the device's rates. Our record names the fastest peer; each peer's own has none.
    """
    device = device or Device.of("cuda").name
    floor_ms = floors(device, flops or {}, moved or {}) if floor_ms is None else floor_ms
    skipped: dict[str, str] = {}
    times: dict[tuple[str, str], Measured] = {}
    for who in (kernel, *peers):
        try:
            for passed, call in passes(run, who, grad).items():
                times[who, passed] = timer(call)
        except NoKernel as refusal:
            if who == kernel:
                raise
            skipped[who] = ", ".join(refusal.reasons[who])
        except torch.OutOfMemoryError:
            if who == kernel:
                raise
            skipped[who] = "out of memory"
    records = []
    for (who, passed), got in times.items():
        others = {peer: times[peer, passed].ms for peer in peers if (peer, passed) in times and who == kernel}
        best = min(others, key=others.__getitem__, default=None)
        records.append(
            record(
                op,
                name,
                who,
                passed,
                ms=got.ms,
                device=device,
                flops=(flops or {}).get(passed),
                moved=(moved or {}).get(passed),
                peak_mib=got.peak_mib,
                first_call_s=got.first_call_s,
                peer=best,
                peer_ms=others[best] if best else None,
                floor_ms=floor_ms.get(passed),
            )
        )
    return records, skipped


def errors(
    run: Callable[..., torch.Tensor],
    inputs: Mapping[str, Any],
    dy: torch.Tensor,
    kernels: Iterable[str],
) -> dict[str, dict[str, float]]:
    """{"y" or "d<input>": {kernel: ‖x − exact‖ / ‖exact‖}}, where exact is the reference's in float64.

    run(kernel, **inputs) gives y; gradients are of the inputs that require them, for y's gradient dy. All kernels, the
    reference too, get the same values.
    """
    names = [name for name, t in inputs.items() if t is not None and t.requires_grad]

    def results(kernel: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        leaves = {name: inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_() for name in names}
        y = run(kernel, **{**inputs, **leaves})
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(names, gradients)}}

    exact = results("reference", torch.float64)
    found: dict[str, dict[str, float]] = {name: {} for name in exact}
    for kernel in kernels:
        for name, value in results(kernel).items():
            found[name][kernel] = error(value, exact[name])
    return found
