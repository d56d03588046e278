"""How kernels are judged: against the float64 definition, with what plain PyTorch loses in the same dtype as measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def flatten(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in flatten(v)]
    return []


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, change) for v in value)
    return value


def _weighting(outputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """A random gradient for every output, drawn in float64 on the CPU: the same for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in outputs]


def outputs_and_gradients(run: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype | None, seed: int = 0):
    """Run with fresh leaves (cast to dtype when given); give outputs and the gradients of `_weighting` of that seed."""

    def leaf(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)

    # nested inputs (states, MIMO triples) too
    fresh = {name: _map(value, leaf) for name, value in inputs.items()}
    outputs = [t for t in flatten(run(**fresh)) if t.is_floating_point()]
    leaves = [t for t in flatten(list(fresh.values())) if t.requires_grad]
    names = [name for name, value in fresh.items() for t in flatten(value) if t.requires_grad]
    if not leaves:
        return outputs, {}
    weighted = [(t, w) for t, w in zip(outputs, _weighting(outputs, seed)) if t.requires_grad]
    gradients = torch.autograd.grad([t for t, _ in weighted], leaves, [w for _, w in weighted], allow_unused=True)
    return outputs, dict(zip((f"{i}:{n}" for i, n in enumerate(names)), gradients))


def _square(value: torch.Tensor, exact: torch.Tensor) -> float:
    """‖value − exact‖² in float64; inf for NaN or Inf."""
    value, exact = value.detach().double(), exact.detach().to(value.device).double()
    if value.shape != exact.shape:
        raise AssertionError(f"shape {list(value.shape)}, but the definition gives {list(exact.shape)}")
    if not torch.isfinite(value).all():
        return float("inf")
    return (value - exact).square().sum().item()


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in float64; an absolute norm where exact is all zero; inf for NaN or Inf."""
    return (_square(value, exact) / (_square(torch.zeros_like(exact), exact) or 1.0)) ** 0.5


def agree(
    run: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    factor: float = 2.0,
    same_dtype: Callable[..., Any] | None = None,
) -> dict[str, tuple[float, float]]:
    """Assert that run(**inputs) is as near to the float64 definition as PyTorch is in the inputs' dtype.

    For every output and gradient, with errors relative to the definition's norm: error(run) <= factor *
    error(same_dtype or definition, in the inputs' dtype), and never asked to be below one rounding of the result's own
    dtype. Several inputs are judged as one, by the root of their summed squares: where a result has a few elements, one
    draw's rounding says little. Gives {name: (error, allowed)}.
    """
    squares: dict[str, list[float]] = {}  # name: ours, plain PyTorch's, and the definition's own
    floors: dict[str, float] = {}
    for seed, draw in enumerate([inputs] if isinstance(inputs, Mapping) else inputs):
        exact, exact_gradients = outputs_and_gradients(definition, draw, torch.float64, seed)
        plain, plain_gradients = outputs_and_gradients(same_dtype or definition, draw, None, seed)
        ours, our_gradients = outputs_and_gradients(run, draw, None, seed)
        assert len(ours) == len(exact), f"{len(ours)} outputs, but the definition gives {len(exact)}"
        triples = {f"output {i}": t for i, t in enumerate(zip(ours, plain, exact))}
        for name, gradient in exact_gradients.items():
            mine, theirs = our_gradients[name], plain_gradients[name]
            if gradient is None or mine is None:
                zero = all(g is None or not g.numel() or not g.abs().max().item() for g in (gradient, mine))
                assert zero, f"gradient {name}: one of {{ours, the definition's}} is missing"
                continue
            triples[f"gradient {name}"] = (mine, theirs, gradient)
        for name, (mine, theirs, truth) in triples.items():
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, value in enumerate((mine, theirs, torch.zeros_like(truth))):
                sums[i] += _square(value, truth)
            floors[name] = torch.finfo(mine.dtype).eps / 2
    judged = {}
    for name, (mine, theirs, truth) in squares.items():
        scale = truth**0.5 or 1.0
        judged[name] = (mine**0.5 / scale, max(factor * theirs**0.5 / scale, floors[name]))
    bad = {name: pair for name, pair in judged.items() if not pair[0] <= pair[1]}
    assert not bad, "; ".join(f"{n}: error {e:.3g}, allowed {a:.3g}" for n, (e, a) in bad.items())
    return judged


def same_bits(run: Callable[..., Any], inputs: Mapping[str, Any], times: int = 3) -> None:
    """Assert that outputs and gradients have the same bits every time."""
    first = None
    for _ in range(times):
        outputs, gradients = outputs_and_gradients(run, inputs, None)
        now = [*outputs, *(g for g in gradients.values() if g is not None)]
        if first is None:
            first = now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True)), "not the same bits twice"


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of step(), which has run before it on a stream of its own, and what step gave while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    return graph, given


def compiles(
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    backend: str = "inductor",
    eager: Callable[..., Any] | None = None,
) -> None:
    """Assert that torch.compile takes run as one graph, with the outputs and gradients of eager (or run) to the bit."""
    torch._dynamo.reset()
    traced = torch.compile(run, backend=backend, fullgraph=True)
    got, want = outputs_and_gradients(traced, inputs, None), outputs_and_gradients(eager or run, inputs, None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def replays(run: Callable[..., Any], make_inputs: Callable[[int], Mapping[str, Any]]) -> None:
    """Assert that forward and backward can be captured in a CUDA graph and replayed with other inputs.

    make_inputs(seed) gives inputs of one shape; replay with seed 2's must give eager's bits on seed 2's.
    """
    static = dict(make_inputs(1))
    other = make_inputs(2)
    wanted_outputs, wanted_gradients = outputs_and_gradients(run, other, None)
    leaves = [t for t in flatten(list(static.values())) if t.is_floating_point() and t.requires_grad]
    weights = _weighting(wanted_outputs)

    def step():
        outputs = [t for t in flatten(run(**static)) if t.is_floating_point()]
        pairs = [(t, w) for t, w in zip(outputs, weights) if t.requires_grad]
        gradients = torch.autograd.grad([t for t, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
        return outputs, gradients

    graph, (outputs, gradients) = captured(step)
    for mine, theirs in zip(flatten(list(static.values())), flatten(list(other.values())), strict=True):
        mine.data.copy_(theirs.data)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(outputs, wanted_outputs, strict=True):
        assert torch.equal(got, want), "replay with other inputs differs from eager"
    for got, want in zip(gradients, wanted_gradients.values(), strict=True):
        assert (got is None) == (want is None) and (got is None or torch.equal(got, want)), "replayed gradient differs"


def kernels_here(operator: str) -> list[str]:
    """Names of the operator's own kernels that aren't peers, for parametrizing tests."""
    from nam56r.kernels.registry import candidates

    return [k.name for k in candidates(operator) if k.role != "peer"]
