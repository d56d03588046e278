"""The causal depthwise convolution: the definition against two others, every kernel against the definition."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.conv1d import causal_conv1d, cuda, reference
from nam56r.kernels.extension import load
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec, candidates, select
from nam56r.kernels.testing import agree, outputs_and_gradients, replays, same_bits

WIDTHS = [2, 3, 4]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EDGES = [1, 2, 3, 4, 5, 33, 63, 64, 65, 1000, 4096]
PACKED = [0, 0, 1, 3, 3, 7, 71, 71, 135, 1000, 1000]


def inputs(
    B, S, C, W, dtype, *, bias=True, state=True, packed=None, parameters=None, margin=0, device="cpu", seed=0, grad=True
):
    """Leaves by name. margin > 0 makes x a slice of a projection that much wider on both sides, with NaN beside it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).to(device)

    x = draw(B, S, C)
    if margin:
        wide = torch.full((B, S, C + 2 * margin), float("nan"), dtype=dtype, device=device)
        wide[..., margin : margin + C] = x
        x = wide[..., margin : margin + C]
    made = {"x": x, "weight": draw(C, W, to=parameters or dtype)}
    if bias:
        made["bias"] = draw(C, to=parameters or dtype)
    if state:
        made["initial_state"] = draw(len(packed) - 1 if packed else B, W - 1, C)
    made = {name: t.requires_grad_(grad) for name, t in made.items()}
    if packed:
        made["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32, device=device)
    return made


def judge(kernel, make, activation="silu"):
    """Against the definition, on make(seed=0), make(seed=1), … taken as one: 48 channels or more."""
    made = make()
    draws = [made, *(make(seed=seed) for seed in range(1, -(-48 // len(made["weight"]))))]
    run = partial(causal_conv1d, activation=activation, kernel=kernel)
    definition = partial(reference.causal_conv1d, activation=activation)
    agree(run, definition, draws, same_dtype=partial(definition, compute_dtype=made["x"].dtype))


def separately(run, made):
    """Every sequence of a packed row by itself, results joined as the packed operator gives them."""
    x, cu_seqlens, state = made["x"], made["cu_seqlens"], made.get("initial_state")
    parts = [
        run(
            x[:, begin:end],
            made["weight"],
            made.get("bias"),
            initial_state=None if state is None else state[i : i + 1],
        )
        for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([final for _, final in parts])


@pytest.mark.parametrize("W", WIDTHS)
def test_is_pytorchs_convolution(W):
    x, weight, bias = inputs(2, 9, 5, W, torch.float64, state=False).values()
    y, final_state = causal_conv1d(x, weight, bias, activation="silu")
    padded = F.pad(x.mT, (W - 1, 0))
    torch.testing.assert_close(y, F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)).mT)
    torch.testing.assert_close(final_state, x[:, -(W - 1) :])


@pytest.mark.parametrize("packed", [None, [0, 0, 1, 6, 6]])
@pytest.mark.parametrize("W", WIDTHS)
def test_step_by_step(W, packed):
    """A queue of the last W inputs: the layer as it decodes."""
    made = inputs(1 if packed else 2, 6, 3, W, torch.float64, packed=packed)
    y, final_state = causal_conv1d(**made)
    sequences = [(0, b, e) for b, e in pairwise(packed)] if packed else [(0, 0, 6), (1, 0, 6)]
    for i, (batch, begin, end) in enumerate(sequences):
        queue = list(made["initial_state"][i])
        for t in range(begin, end):
            queue = [*queue[-(W - 1) :], made["x"][batch, t]]
            expected = made["bias"] + sum(made["weight"][:, w] * queue[w] for w in range(W))
            torch.testing.assert_close(y[batch, t], expected)
        torch.testing.assert_close(final_state[i], torch.stack(queue[-(W - 1) :]))


@pytest.mark.parametrize("packed", [None, [0, 2, 2, 3, 6]])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", WIDTHS)
def test_gradcheck(W, activation, packed):
    made = inputs(1 if packed else 2, 6 if packed else 2, 2, W, torch.float64, packed=packed)
    cu_seqlens = made.pop("cu_seqlens", None)

    def run(x, weight, bias, initial_state):
        return causal_conv1d(x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens)

    torch.autograd.gradcheck(run, tuple(made.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 2, 5, 65])
@pytest.mark.parametrize("W", WIDTHS)
def test_reference_agrees(W, S, dtype):
    judge("reference", partial(inputs, 2, S, 48, W, dtype))
    judge("reference", partial(inputs, 2, S, 48, W, dtype, bias=False, state=False, parameters=torch.float32), None)


def test_state_carries_on():
    """Two pieces, the second from the first's final state, are the whole; the first is shorter than the state."""
    x, weight, bias = inputs(2, 9, 5, 4, torch.float64, state=False).values()
    whole, final = causal_conv1d(x, weight, bias)
    first, state = causal_conv1d(x[:, :2], weight, bias)
    second, last = causal_conv1d(x[:, 2:], weight, bias, initial_state=state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, final)
    torch.testing.assert_close(causal_conv1d(x[:, :0], weight, bias, initial_state=state)[1], state)


def test_packed_equals_separate():
    made = inputs(1, PACKED[-1], 3, 4, torch.float64, packed=PACKED)
    run = partial(causal_conv1d, activation="silu")
    packed, separate = run(**made), separately(run, made)
    torch.testing.assert_close(packed, separate)


def test_nothing_to_do():
    weight = torch.ones(3, 4)
    y, final_state = causal_conv1d(torch.ones(2, 0, 3), weight)
    assert y.shape == (2, 0, 3) and final_state.equal(torch.zeros(2, 3, 3))
    assert [t.shape for t in causal_conv1d(torch.ones(0, 5, 3), weight)] == [(0, 5, 3), (0, 3, 3)]
    nobody = torch.zeros(1, dtype=torch.int32)
    assert causal_conv1d(torch.ones(1, 0, 3), weight, cu_seqlens=nobody)[1].shape == (0, 3, 3)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"x is \[2, 5\], but must be \[B, S, C\]"),
        ({"x": torch.ones(2, 5, 3).int()}, TypeError, "x is int32"),
        ({"weight": torch.ones(4, 4)}, ValueError, r"weight is \[4, 4\], but must be \[C=3, W\]"),
        ({"weight": torch.ones(3, 4).half()}, TypeError, "weight is float16, but must be float32"),
        ({"weight": torch.ones(3, 5)}, ValueError, r"weight is \[3, 5\], but its width must be 2, 3 or 4"),
        ({"bias": torch.ones(4)}, ValueError, r"bias is \[4\]"),
        ({"activation": "relu"}, ValueError, "activation is 'relu', but must be one of None, 'silu'"),
        (
            {"initial_state": torch.ones(2, 4, 3)},
            ValueError,
            r"initial_state is \[2, 4, 3\], but must be \[2, 3, C=3\]",
        ),
        ({"initial_state": torch.ones(2, 3, 3).double()}, TypeError, "initial_state is float64"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "B must be 1, not 2"),
        ({"x": torch.ones(1, 5, 3), "cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens is int64"),
        ({"x": torch.ones(1, 5, 3), "cu_seqlens": torch.tensor([0, 4]).int()}, ValueError, "must rise from 0 to S = 5"),
        ({"kernel": "cuda"}, NoKernel, "a CUDA kernel, but the device is cpu"),
    ],
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        causal_conv1d(**({"x": torch.ones(2, 5, 3), "weight": torch.ones(3, 4)} | change))


def problem(dtype, device=DEVICES["h200"]):
    specs = {"x": Spec((2, 4096, 944), dtype), "weight": Spec((944, 4), dtype)}
    return Problem.of("causal_conv1d", device, **specs)


def test_planned_on_a_gpu():
    if load() is None and cuda.REGISTERED:
        assert select(problem(torch.bfloat16)).name == "cuda"
    else:
        with pytest.raises(NoKernel, match="CUDA extension"):
            select(problem(torch.bfloat16))
    (reasons,) = (k.refuses(problem(torch.float64)) for k in candidates("causal_conv1d") if k.name == "cuda")
    assert "x is torch.float64, but the CUDA kernel takes bfloat16, float16 or float32" in reasons


@pytest.mark.skipif(not cuda.REGISTERED, reason="the extension isn't built")
@pytest.mark.parametrize("packed", [None, PACKED])
def test_traced_shapes(packed):
    """What the compiled operator tells torch.compile: shapes and dtypes of results and gradients, without a GPU."""
    made = inputs(1 if packed else 2, 1000, 24, 4, torch.bfloat16, packed=packed, parameters=torch.float32)
    made = {name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in made.items()}
    y, final_state = cuda.causal_conv1d(
        made["x"], made["weight"], made["bias"], "silu", made["initial_state"], made.get("cu_seqlens")
    )
    y.sum().backward()
    assert (y.shape, y.dtype) == (made["x"].shape, torch.bfloat16)
    assert (final_state.shape, final_state.dtype) == (made["initial_state"].shape, torch.bfloat16)
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in made.values() if t.requires_grad)


# From here on a GPU.

gpu = pytest.mark.gpu
on_gpu = partial(inputs, device="cuda")


@gpu
@pytest.mark.parametrize("C", [1, 7, 8, 944])
@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_agrees(dtype, W, C, poisoned):
    for S in EDGES if C > 1 else (1, 2, 3, 5, 64, 65, 1000):  # one channel takes many draws
        for activation in (None, "silu"):
            judge("cuda", partial(on_gpu, 2, S, C, W, dtype), activation)


@gpu
@pytest.mark.parametrize("margin", [0, 3, 8])
@pytest.mark.parametrize("bias, state", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_agrees_without(dtype, bias, state, margin, poisoned):
    """Arguments left out, fp32 parameters, x read in place: aligned (margin 8) and not (margin 3)."""
    for S in (1, 3, 65, 1000):
        options = {"bias": bias, "state": state, "parameters": torch.float32, "margin": margin}
        judge("cuda", partial(on_gpu, 2, S, 96, 4, dtype, **options))


@gpu
@pytest.mark.parametrize("C", [7, 96])
@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_packed(dtype, W, C, poisoned):
    for ends in (PACKED, [0, 0], [0, 1000], [0, *range(1, 40), 1000], [0, 0, 998, 999, 1000, 1000]):
        for state in (True, False):
            judge("cuda", partial(on_gpu, 1, ends[-1], C, W, dtype, packed=ends, state=state))


@gpu
def test_gpu_packed_equals_separate():
    """The same bits: a sequence doesn't notice its neighbours."""
    made = on_gpu(1, PACKED[-1], 24, 4, torch.bfloat16, packed=PACKED, grad=False)
    run = partial(causal_conv1d, activation="silu", kernel="cuda")
    packed, separate = run(**made), separately(run, made)
    assert all(torch.equal(a, b) for a, b in zip(packed, separate))


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("S, C", [(8192, 2048), (4096, 8192), (60000, 96)])
def test_gpu_long_runs(S, C, packed, poisoned):
    """Sizes that take the middle and the longest runs."""
    ends = [0, 5, 5, S // 2 + 1, S - 64, S] if packed else None
    make = partial(on_gpu, 1 if packed else 2, S if packed else S // 2, C, 4, torch.bfloat16)
    judge("cuda", partial(make, parameters=torch.float32, packed=ends))


@gpu
@pytest.mark.parametrize("used", ["y", "final_state"])
def test_gpu_one_result_used(used, poisoned):
    made = on_gpu(2, 2, 944, 4, torch.float32)
    definition = partial(reference.causal_conv1d, activation="silu")
    pick = ("y", "final_state").index(used)
    agree(
        lambda **made: causal_conv1d(**made, activation="silu", kernel="cuda")[pick],
        lambda **made: definition(**made)[pick],
        made,
    )


@gpu
def test_gpu_strides():
    """Transposed and expanded tensors, and a broadcast gradient, are copied first."""
    x, weight, bias, state = on_gpu(2, 65, 24, 4, torch.bfloat16).values()
    want, want_gradients = outputs_and_gradients(
        partial(causal_conv1d, kernel="cuda"), {"x": x, "weight": weight, "bias": bias, "initial_state": state}, None
    )
    strided = {
        "x": x.detach().mT.contiguous().mT,
        "weight": weight.detach().T.contiguous().T,
        "bias": bias.detach().repeat_interleave(2)[::2],
        "initial_state": state.detach().mT.contiguous().mT,
    }
    leaves = {name: t.requires_grad_() for name, t in strided.items()}
    y, final_state = causal_conv1d(**leaves, kernel="cuda")
    assert torch.equal(y, want[0]) and torch.equal(final_state, want[1])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in want]
    gradients = torch.autograd.grad((y, final_state), list(leaves.values()), [w.mT.contiguous().mT for w in weights])
    for got, expected in zip(gradients, want_gradients.values()):
        assert torch.equal(got, expected)
    y, _ = causal_conv1d(x, weight, bias, kernel="cuda")
    (broadcast,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (dense,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(broadcast, dense)


@gpu
def test_gpu_beyond_32_bit_offsets():
    """x of 2^31 + 2^27 elements, read as a slice: the last rows are those of a small problem."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    C, margin, tail = 1024, 1024, 512
    S = (2**31 + 2**27) // (C + margin)
    wide = torch.zeros(1, S, C + margin, dtype=torch.bfloat16, device="cuda")
    wide[:, -tail:, :C].normal_()
    weight = torch.randn(C, 4, device="cuda")
    x = wide[..., :C].requires_grad_()
    y, _ = causal_conv1d(x, weight, activation="silu", kernel="cuda")
    short = wide[:, -tail:, :C].detach().clone().requires_grad_()
    expected, _ = causal_conv1d(short, weight, activation="silu", kernel="cuda")
    assert torch.equal(y[:, -tail:], expected)
    dy = torch.randn_like(expected)
    full = torch.zeros_like(y)
    full[:, -tail:] = dy
    (dx,) = torch.autograd.grad(y, x, full)
    (dshort,) = torch.autograd.grad(expected, short, dy)
    assert torch.equal(dx[:, -tail:], dshort)


@gpu
def test_gpu_nothing_to_do():
    weight = torch.ones(8, 4, device="cuda", requires_grad=True)
    for B, S in ((2, 0), (0, 5)):
        x = torch.ones(B, S, 8, device="cuda", requires_grad=True)
        state = torch.ones(B, 3, 8, device="cuda", requires_grad=True)
        y, final_state = causal_conv1d(x, weight, initial_state=state, kernel="cuda")
        assert y.shape == (B, S, 8) and (S or torch.equal(final_state, state))
        gradients = torch.autograd.grad((y.sum() + 2 * final_state.sum()), (weight, state))
        assert gradients[0].equal(torch.zeros_like(weight)) and gradients[1].equal(2 * torch.ones_like(state))


@gpu
@pytest.mark.parametrize("packed", [None, PACKED])
def test_gpu_repeats_and_replays(packed):
    make = partial(on_gpu, 1 if packed else 2, 1000, 944, 4, torch.bfloat16, packed=packed)
    run = partial(causal_conv1d, activation="silu", kernel="cuda")
    same_bits(run, make())
    replays(run, lambda seed: make(seed=seed))


@gpu
@pytest.mark.parametrize("packed", [None, PACKED])
@pytest.mark.parametrize("full", [True, False])
def test_gpu_opcheck(full, packed):
    made = on_gpu(1 if packed else 2, 1000, 24, 4, torch.float32, bias=full, state=full, packed=packed)
    tensors = [made.get(name) for name in ("x", "weight", "bias", "initial_state", "cu_seqlens")]
    torch.library.opcheck(torch.ops.nam56r.causal_conv1d_forward.default, (*tensors, True))
    x, *rest = (t if t is None else t.detach() for t in tensors)
    dfinal_state = torch.randn(len(packed) - 1 if packed else 2, 3, 24, device="cuda") if full else None
    torch.library.opcheck(
        torch.ops.nam56r.causal_conv1d_backward.default, (torch.randn_like(x), dfinal_state, x, *rest, True)
    )


@gpu
def test_gpu_compiles():
    made = on_gpu(2, 65, 24, 4, torch.float32)

    def layer(x, **parameters):
        return causal_conv1d(x * 2, **parameters, activation="silu", kernel="cuda")[0] + 1

    eager, compiled = layer(**made), torch.compile(layer, fullgraph=True)(**made)
    assert torch.equal(compiled, eager)
    dy = torch.randn_like(eager)
    for got, want in zip(*(torch.autograd.grad(y, list(made.values()), dy) for y in (compiled, eager))):
        assert torch.equal(got, want)


@gpu
def test_gpu_no_second_derivative():
    x, weight = on_gpu(1, 5, 8, 4, torch.float32, bias=False, state=False).values()
    (dx,) = torch.autograd.grad(causal_conv1d(x, weight, kernel="cuda")[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        dx.sum().backward()
