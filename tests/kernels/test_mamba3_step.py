"""One step of Mamba-3: the definition beside the scan, Triton beside the definition, interpreted and on a GPU."""

import math
import os
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nam56r.kernels import triton_runtime
from nam56r.kernels.mamba3 import Mamba3State, mamba3_scan, mamba3_step, reference
from nam56r.kernels.registry import DEVICES, Device, NoKernel, Problem, candidates, select
from nam56r.kernels.testing import agree, flatten, kernels_here

gpu = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RECIPE = {"H": 128, "P": 64, "G": 8, "N": 128, "N_a": 32}
SCALARS = ("dt", "log_decay", "trap")
NAMES = kernels_here("mamba3_step")
TRITON = partial(mamba3_step, kernel="triton")
TOKEN = ("x", "B", "C", "dt", "log_decay", "trap", "angles", "z")


def inputs(
    n=2, H=4, P=3, G=2, N=8, N_a=2, R=None, *, shared=True, gate=True, dtype=torch.float32, parameters=None,
    device="cpu", seed=0,
):  # fmt: skip
    """R: MIMO rank, None for SISO; parameters: the dtype of all but x, B, C, z and the state."""
    generator = torch.Generator().manual_seed(seed)
    wide, rank = torch.promote_types(dtype, torch.float32), R or 1

    def draw(*shape, dtype=parameters or wide):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    dt = F.softplus(draw(n, H) - 1)
    made = {
        "x": draw(n, H, P, dtype=dtype),
        "B": draw(n, rank, G, N, dtype=dtype),
        "C": draw(n, rank, G, N, dtype=dtype),
        "dt": dt,
        "log_decay": -dt * torch.rand(n, H, generator=generator).to(dt),
        "trap": draw(n, H),
        "angles": draw(n, 1 if shared else H, N_a),
        "B_bias": draw(H, rank, N),
        "C_bias": draw(H, rank, N),
        "D": draw(H),
    }
    if gate:
        made["z"] = draw(n, H, P, dtype=dtype)
    if R:
        made["mimo"] = tuple(draw(H, R, P) for _ in range(3))
    ssm, k, v, angle = (draw(n, H, *shape, dtype=wide) for shape in ((P, N), (rank, N), (rank, P), (N_a,)))
    made["state"] = Mamba3State(ssm, k, v, angle.remainder(2 * torch.pi))
    return made


def scanned(state, **made):
    """A step as a scan of length 1."""
    made |= {name: made[name].unsqueeze(-1 if name in SCALARS else 1) for name in TOKEN if name in made}
    y, final = mamba3_scan(**made, initial_state=state)
    return y.squeeze(1), final


SHAPES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 2),
        "heads": st.tuples(st.integers(1, 2), st.integers(1, 3)),  # groups, and heads of each
        "P": st.integers(1, 9),
        "N": st.integers(1, 9).map(lambda half: 2 * half),
        "N_a": st.integers(0, 9),
        "R": st.sampled_from([None, 1, 2, 3, 4]),
        "shared": st.booleans(),
        "gate": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def drawn(heads, N, N_a, **shape):
    G, each = heads
    return inputs(H=G * each, G=G, N=N, N_a=min(N_a, N // 2), **shape)


def judge(draws, factor=2.0):
    """Triton beside the definition, over a list of draws."""
    agree(TRITON, reference.mamba3_step, draws, factor=factor)
    for made in draws:
        y, final = TRITON(**made)
        assert y.dtype == made["x"].dtype
        assert (final.angle >= 0).all() and (final.angle < 2 * torch.pi).all()


def assert_same(mine, same):
    assert all(torch.equal(a, b) for a, b in zip(flatten(mine), flatten(same), strict=True))


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_the_definition_is_a_scan_of_one_step(shape):
    made = drawn(**shape, dtype=torch.float64)
    for mine, same in zip(flatten(mamba3_step(**made)), flatten(scanned(**made)), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES)
def test_triton(interpreter, shape):
    elements = shape["n"] * math.prod(shape["heads"]) * shape["P"]  # of y: the rounding of a few says little
    draws = range(max(2, -(-96 // elements)))
    judge([drawn(**shape | {"seed": shape["seed"] + more}) for more in draws], factor=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [None, 8])
def test_triton_at_its_largest(interpreter, R, dtype):
    judge([inputs(n=1, H=2, G=1, P=128, N=256, N_a=64, R=R, dtype=dtype)])


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float64])
def test_triton_mixed_dtypes(interpreter, parameters):
    judge([inputs(R=2, dtype=torch.float16, parameters=parameters, seed=seed) for seed in range(3)])


def test_triton_wraps_angles(interpreter):
    """From just inside both ends of [0, 2π), a little or many times round, either way."""
    made = inputs(n=4, H=8, N=16, N_a=8)
    ends = torch.tensor([0.0, 1e-7, torch.pi, 2 * torch.pi - 1e-6])
    made["state"] = made["state"]._replace(angle=ends.repeat(64).view(4, 8, 8))
    made["dt"] = torch.tensor([0.0, 1e-8, 1e-3, 100.0]).repeat(8).view(4, 8)
    made["angles"] = 3 * torch.randn(4, 8, 8)
    made["angles"][0] = 0
    _, exact = reference.mamba3_step(**{name: wide(t) for name, t in made.items()})
    angle = TRITON(**made)[1].angle
    assert (angle >= 0).all() and (angle < 2 * torch.pi).all()
    plain = reference.mamba3_step(**made)[1].angle
    mine, theirs = ((t - exact.angle + torch.pi) % (2 * torch.pi) - torch.pi for t in (angle, plain))
    assert mine.norm() <= 2 * theirs.norm()


@pytest.mark.parametrize("name", ["x", "B", "C", "dt", "log_decay", "trap", "angles", "z"])
def test_triton_keeps_nan_to_its_row(interpreter, name):
    made = inputs(n=3)
    made[name][1] = torch.nan
    y, state = TRITON(**made)
    assert y.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert not any(t[[0, 2]].isnan().any() for t in state)


def test_triton_at_infinity(interpreter):
    """Everything is forgotten; only the step before counts, or only this one."""
    made = inputs(n=4, N=16, N_a=8)
    made["log_decay"][0], made["trap"][1], made["trap"][2] = -torch.inf, torch.inf, -torch.inf
    made["angles"][3] = torch.inf
    judge([made])


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(*map(wide, value)) if hasattr(value, "_fields") else tuple(map(wide, value))


def sequence(length, **shape):
    tokens = [inputs(**shape, seed=seed) for seed in range(length)]
    made = {}
    for name in tokens[0].keys() & set(TOKEN):
        made[name] = torch.stack([token[name] for token in tokens], dim=-1 if name in SCALARS else 1)
    return tokens[0] | made


def whole(state, **made):
    return mamba3_scan(**made, initial_state=state, kernel="reference")


def halves(step, state, **made):
    """The scan of the first half, and steps for the rest."""

    def at(i):
        given = made.keys() & set(TOKEN)
        return made | {name: made[name][..., i] if name in SCALARS else made[name][:, i] for name in given}

    length = made["x"].shape[1]
    first, state = whole(**at(slice(length // 2)), state=state)
    outputs = []
    for t in range(length // 2, length):
        y, state = step(**at(t), state=state)
        outputs.append(y)
    return torch.cat((first, torch.stack(outputs, dim=1)), dim=1), state


@pytest.mark.parametrize("R", [None, 1, 4])
def test_steps_go_on_from_a_scan(R):
    made = sequence(40, R=R, dtype=torch.float64)
    for mine, same in zip(flatten(halves(mamba3_step, **made)), flatten(whole(**made)), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-10, atol=1e-10)


def goes_on(**shape):
    """Triton's steps err no more than the definition's; both are judged by the whole scan."""
    agree(partial(halves, TRITON), whole, sequence(**shape), same_dtype=partial(halves, reference.mamba3_step))


@pytest.mark.parametrize("R", [None, 2])
def test_triton_goes_on_from_a_scan(interpreter, R):
    goes_on(length=16, R=R, N=16, N_a=8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("R", [None, 2])
def test_out(interpreter, name, R):
    made = inputs(R=R, H=6, P=5, N=12)
    run, before = partial(mamba3_step, kernel=name), clone(made["state"])
    y, new = run(**made)
    assert_same(made["state"], before)
    other = Mamba3State(*(torch.full_like(t, torch.nan) for t in new))
    y_other, given = run(**made, out=other)
    assert all(map(torch.equal, given, other))
    assert_same((y_other, other), (y, new))
    assert_same(made["state"], before)
    assert_same(run(**made, out=made["state"])[0], y)
    assert_same(made["state"], new)


@pytest.mark.parametrize("R", [None, 2])
def test_triton_takes_any_strides(interpreter, R):
    made = inputs(n=3, H=6, P=5, N=12, R=R, shared=False)
    strided = made | {name: every_other(made[name]) for name in made if name not in ("mimo", "state")}
    strided["state"] = Mamba3State(*map(every_other, made["state"]))
    if R:
        strided["mimo"] = tuple(map(every_other, made["mimo"]))
    assert not any(t.is_contiguous() for t in flatten(list(strided.values())))
    assert_same(TRITON(**strided), TRITON(**made))


def every_other(t):
    """The same values, first dimension innermost, with gaps."""
    wide = t.new_full((*reversed(t.shape), 2), torch.nan)
    return wide[..., 0].permute(*reversed(range(t.ndim))).copy_(t)


def clone(state):
    return Mamba3State(*(t.clone() for t in state))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("R", [None, 2])
def test_no_sequences(interpreter, name, R):
    made = inputs(n=0, R=R)
    y, state = mamba3_step(**made, kernel=name)
    assert y.shape == (0, 4, 3)
    assert [t.shape for t in state] == [t.shape for t in made["state"]]


@pytest.mark.parametrize("R", [None, 2])
def test_triton_in_one_graph(interpreter, R):
    made = inputs(R=R)
    torch.library.opcheck(torch.ops.nam56r.mamba3_step.default, operands(made))
    torch._dynamo.reset()
    compiled = torch.compile(TRITON, backend="aot_eager", fullgraph=True)
    assert_same(compiled(**made), TRITON(**made))
    state, again = clone(made["state"]), clone(made["state"])
    assert_same(compiled(**made | {"state": state}, out=state), TRITON(**made | {"state": again}, out=again))
    assert_same(state, again)


def operands(made):
    """The registered operator's arguments, with a state of its own to write."""
    plain = [made.get(name) for name in (*TOKEN[:-1], "B_bias", "C_bias", "D", "z")]
    return *plain, *made.get("mimo", (None,) * 3), *made["state"], *map(torch.empty_like, made["state"])


def change_state(**parts):
    return {"state": inputs()["state"]._replace(**parts)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"C": torch.zeros(2, 1, 1, 8)},
            ValueError,
            r"mamba3_step: C is \[2, 1, 1, 8\], but must be \[n=2, R=1, G=2, N=8",
        ),
        ({"dt": torch.zeros(4, 2)}, ValueError, r"dt is \[4, 2\], but must be \[n=2, H=4\]"),
        ({"angles": torch.zeros(2, 2, 2)}, ValueError, r"angles is \[2, 2, 2\]"),
        ({"angles": torch.zeros(2, 1, 5)}, ValueError, "mamba3_step: angles turn N_a = 5 pairs of N = 8"),
        ({"B": torch.zeros(2, 2, 2, 8), "C": torch.zeros(2, 2, 2, 8)}, ValueError, "B_bias is"),
        ({"D": None}, TypeError, "D is NoneType"),
        ({"mimo": (torch.zeros(4, 1, 3),)}, TypeError, r"mimo must be a tuple \(psi, zeta, phi\)"),
        ({"state": None}, TypeError, "mamba3_step: state is NoneType, but must be a Mamba3State"),
        (
            change_state(k=torch.zeros(3, 4, 1, 8)),
            ValueError,
            r"state.k is \[3, 4, 1, 8\], but must be \[n=2, H=4, R=1",
        ),
        (change_state(v=torch.zeros(2, 4, 1, 3).half()), TypeError, "state.v is float16, but must be float32"),
        ({"out": inputs(n=1)["state"]}, ValueError, r"out.ssm is \[1, 4, 3, 8\]"),
        (
            {"out": inputs()["state"]._replace(ssm=torch.zeros(2, 4, 8, 3).mT)},
            ValueError,
            r"out.ssm has strides \(96, 24, 1, 3\), but must be contiguous",
        ),
        ({"D": torch.zeros(4, requires_grad=True)}, ValueError, "D requires a gradient, but a step has none: call it"),
        (change_state(angle=torch.zeros(2, 4, 2, requires_grad=True)), ValueError, "state.angle requires a gradient"),
        ({"kernel": "cuda"}, ValueError, "no kernel 'cuda': one of triton, reference"),
        ({"kernel": "triton"}, NoKernel, "but the device is cpu: set TRITON_INTERPRET=1"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mamba3_step(**{**inputs(), **change})


def test_parameters_that_train_are_fine_without_gradients():
    made = inputs()
    made["D"].requires_grad_()
    with torch.no_grad():
        mamba3_step(**made)


def refusals(device, **shape):
    made = inputs(**shape)
    state = made.pop("state")
    psi, zeta, phi = made.pop("mimo", (None, None, None))
    problem = Problem.of("mamba3_step", device=device, **made, psi=psi, zeta=zeta, phi=phi, state=state.ssm)
    return problem, candidates("mamba3_step")[0].refuses(problem)


@pytest.mark.parametrize("R", [None, 4])
def test_planned_on_a_gpu(R):
    problem, why = refusals(DEVICES["h200"], n=1, R=R, **RECIPE)
    assert why == ()
    assert select(problem).name == "triton"


def test_refused():
    """Every reason at once."""
    _, why = refusals(Device("t4", "cuda", (7, 5)), n=1, P=129, N=258, R=9, dtype=torch.float64)
    assert why == (
        "t4 is sm_75, but it takes sm_80 or later",
        "x is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "P = 129, but the Triton kernel takes 1 to 128",
        "N = 258, but the Triton kernel takes 2 to 256",
        "R = 9, but the Triton kernel takes 1 to 8",
    )


def test_interpreted_only_by_name(interpreter):
    problem, why = refusals(DEVICES["cpu"])
    assert why == ()
    assert select(problem, "triton").name == "triton"
    assert select(problem).name == "reference"


def test_the_interpreter_leaves_triton_as_it_was():
    def everything():
        modules = [m for name, m in sys.modules.items() if name.startswith(("nam56r.kernels", "triton.language"))]
        return {module.__name__: dict(vars(module)) for module in modules}

    before, environment = everything(), dict(os.environ)
    with pytest.raises(KeyboardInterrupt), triton_runtime.interpreter():
        assert triton_runtime.interpreted()
        TRITON(**inputs(R=2))
        raise KeyboardInterrupt
    assert not triton_runtime.interpreted()
    assert everything() == before
    assert os.environ == environment


def on_gpu(**shape):
    return inputs(device="cuda", **shape)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [None, 1, 2, 4, 8])
def test_gpu(R, dtype, poisoned):
    for n in (1, 3):
        judge([on_gpu(n=n, **RECIPE, R=R, dtype=dtype)])


@gpu
@pytest.mark.parametrize(
    "shape",
    [
        {"H": 1, "G": 1, "P": 1, "N": 2, "N_a": 0},
        {"H": 3, "G": 3, "P": 3, "N": 6, "N_a": 3, "shared": False},
        {"H": 6, "G": 2, "P": 48, "N": 80, "N_a": 17, "gate": False},
        {"H": 51, "G": 17, "P": 127, "N": 254, "N_a": 127},
        {"H": 4, "G": 1, "P": 128, "N": 256, "N_a": 64},
        {"H": 4, "G": 4, "P": 32, "N": 32, "N_a": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("R", [None, 3, 8])
def test_gpu_shapes(R, shape, poisoned):
    judge([on_gpu(n=5, R=R, **shape, seed=seed) for seed in range(4)])


@gpu
@pytest.mark.parametrize("R", [None, 4])
def test_gpu_goes_on_from_a_scan(R):
    goes_on(length=64, R=R, **RECIPE | {"H": 16}, device="cuda")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [None, 4])
def test_gpu_same_bits_in_place_and_in_a_graph(R, dtype, poisoned):
    """Eight tokens: new states; the state written over itself; replays of one captured step."""
    tokens = [on_gpu(n=33, **RECIPE, R=R, dtype=dtype, seed=seed) for seed in range(8)]
    fixed = {name: t for name, t in tokens[0].items() if name not in TOKEN}
    start = fixed.pop("state")
    tokens = [{name: token[name] for name in TOKEN} for token in tokens]

    def eager(in_place):
        state, outputs = clone(start), []
        for token in tokens:
            y, state = TRITON(**token, **fixed, state=state, out=state if in_place else None)
            outputs.append(y)
        return outputs, state

    want = eager(False)
    assert_same(eager(False), want)
    assert_same(eager(True), want)

    static, state = {name: t.clone() for name, t in tokens[0].items()}, clone(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = TRITON(**static, **fixed, state=state, out=state)
    for mine, t in zip(state, start):
        mine.copy_(t)
    outputs = []
    for token in tokens:
        for name, t in token.items():
            static[name].copy_(t)
        graph.replay()
        outputs.append(y.clone())
    assert_same((outputs, state), want)


@gpu
def test_gpu_beyond_32_bit_offsets():
    """A state of more than 2^31 elements, in place: its last row is as right as a row alone."""
    n = 2**31 // (128 * 64 * 128) + 2
    made = on_gpu(n=1, **RECIPE, R=2, dtype=torch.bfloat16)
    many = {name: t.expand(n, *t.shape[1:]) if name in TOKEN else t for name, t in made.items()}
    many["state"] = Mamba3State(*(t.repeat(n, *(1,) * (t.ndim - 1)) for t in made["state"]))
    y, state = TRITON(**many, out=many["state"])
    y_one, one = TRITON(**made)
    assert_same((y[-1:], *(t[-1:] for t in state)), (y_one, *one))


@gpu
@pytest.mark.parametrize("R", [None, 2])
def test_gpu_in_one_graph(R):
    made = on_gpu(**RECIPE, R=R, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.nam56r.mamba3_step.default, operands(made))
    torch._dynamo.reset()
    compiled = torch.compile(TRITON, fullgraph=True)
    assert_same(compiled(**made), TRITON(**made))
