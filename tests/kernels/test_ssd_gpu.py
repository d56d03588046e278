"""The CUDA scans of Mamba-2 and Mamba-3 on a device: against their float64 definitions, and where kernels go wrong.

A model is "mamba2", "siso" (Mamba-3), or MIMO's rank.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.mamba2 import mamba2_scan
from nam56r.kernels.mamba2 import reference as mamba2_reference
from nam56r.kernels.mamba3 import Mamba3State, mamba3_scan
from nam56r.kernels.mamba3 import reference as mamba3_reference
from nam56r.kernels.ssd import sizes
from nam56r.kernels.testing import agree, error, flatten, outputs_and_gradients, replays, same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODELS = ["mamba2", "siso", 1, 2, 4, 8]
BUILT = ["mamba2", "siso", 4]  # ahead, with N = 128
PACKED = [0, 0, 1, 1, 18, 82, 300, 300]  # empty ones, one token, less than a chunk, a chunk's length, several spans
every_model = pytest.mark.parametrize("model", MODELS)
built_models = pytest.mark.parametrize("model", BUILT)


def scan(model):
    return partial(mamba2_scan if model == "mamba2" else mamba3_scan, kernel="cuda")


def definition(model):
    return mamba2_reference.mamba2_scan if model == "mamba2" else mamba3_reference.mamba3_scan


def inputs(
    model, S=64, H=8, G=2, P=64, N=128, B=2, *, shared=True, gate=True, D="H", softplus=True, state=False, ends=None,
    dtype=torch.bfloat16, parameters=torch.float32, seed=0,
):  # fmt: skip
    """All leaves. ends: packed bounds (B = 1); parameters: dtype of all but x, B, C, z; shared: angles, by heads."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape, dtype=parameters):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype)

    if ends is not None:
        B, S = 1, ends[-1]
    n, rank = B if ends is None else len(ends) - 1, model if isinstance(model, int) else 1
    scale = N**-0.25  # q kᵀ is about 1
    made = {"x": draw(B, S, H, P, dtype=dtype)}
    if gate:
        made["z"] = draw(B, S, H, P, dtype=dtype)
    if model == "mamba2":
        made |= {name: (draw(B, S, G, N) * scale).to(dtype) for name in "BC"}
        made |= {"dt": draw(B, S, H) - 2, "A": -draw(H).exp(), "dt_softplus": softplus}
        if softplus:
            made["dt_bias"] = draw(H) / 2
        else:
            made["dt"] = made["dt"].exp()
        if D:
            made["D"] = draw(H) if D == "H" else draw(H, P)
        if state:
            made["initial_state"] = draw(n, H, P, N)
    else:
        made |= {name: (draw(B, S, rank, G, N) * scale).to(dtype) for name in "BC"}
        made["dt"] = F.softplus(draw(B, S, H) - 1).transpose(1, 2)
        made["log_decay"] = -made["dt"] * torch.sigmoid(2 * draw(B, H, S))
        made |= {"trap": draw(B, H, S), "angles": draw(B, S, 1 if shared else H, N // 4), "D": draw(H)}
        made |= {name: draw(H, rank, N) * scale for name in ("B_bias", "C_bias")}
        if model != "siso":
            made["mimo"] = tuple(draw(H, rank, P) for _ in range(3))
        if state:
            shapes = (H, P, N), (H, rank, N), (H, rank, P)
            angle = (draw(n, H, N // 4) * 9).remainder(2 * math.pi)
            made["initial_state"] = Mamba3State(*(draw(n, *shape) for shape in shapes), angle)
    made = leaves(made)
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    return made


def tokens_of(model):
    """The dimension of what has tokens."""
    return {"x": 1, "z": 1, "B": 1, "C": 1, "angles": 1, "trap": 2, "log_decay": 2, "dt": 1 if model == "mamba2" else 2}


def narrowed(made, model, start, end):
    along = tokens_of(model)
    return {name: t.narrow(along[name], start, end - start) if name in along else t for name, t in made.items()}


def leaves(made):
    """The same values, nested ones too, as leaves that ask for a gradient."""

    def leaf(value):
        if isinstance(value, tuple):
            return type(value)(*map(leaf, value)) if hasattr(value, "_fields") else tuple(map(leaf, value))
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().requires_grad_()
        return value

    return {name: leaf(value) for name, value in made.items()}


def judge(model, drawn, part=lambda result: result, run=None, factor=2.0):
    """As near to the float64 definition as PyTorch in the inputs' dtype; part(result) is what is read of it."""

    def plain(**made):  # in fp32 also where the kernel turns: the final angle is asked to be as fp16 would hold it
        y, final = definition(model)(**made, compute_dtype=made["x"].dtype)
        if model != "mamba2":
            final = final._replace(angle=final.angle + (final.angle.half().float() - final.angle).detach())
        return y, final

    def read(run):
        return lambda **made: part(run(**made))

    return agree(read(run or scan(model)), read(definition(model)), drawn, factor=factor, same_dtype=read(plain))


def draws(model, change=lambda made: made, **options):
    """Several: of a gradient that has an element a head, few heads' rounding says little."""
    count = -(-24 // options.get("H", 8))
    return [leaves(change(inputs(model, **options, seed=seed))) for seed in range(count)]


def everything(model, made, run=None):
    """Outputs and gradients, by name."""
    outputs, gradients = outputs_and_gradients(run or scan(model), made, None)
    return {f"output {i}": t for i, t in enumerate(outputs)} | gradients


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert (got[name] is None) == (t is None) and (t is None or torch.equal(got[name], t)), name


SHAPES = [
    ("mamba2", dict(S=1, H=1, G=1, P=32, N=32, state=True)),
    ("mamba2", dict(S=17, H=17, G=1, P=128, N=64, D="H P")),
    ("mamba2", dict(S=64, H=40, G=8, D=None, gate=False)),
    ("mamba2", dict(S=65, H=2, G=1, N=256, D="H P", state=True)),
    ("mamba2", dict(S=127, H=4, G=4, P=128, gate=False)),
    ("mamba2", dict(S=129, H=32, G=2, softplus=False)),
    ("mamba2", dict(S=300, H=4, G=4, P=32, D=None, state=True)),
    ("siso", dict(S=1, H=4, G=4, P=128, state=True)),
    ("siso", dict(S=2, H=1, G=1, N=64, state=True)),
    ("siso", dict(S=15, H=32, G=2, P=32, shared=False)),
    ("siso", dict(S=63, H=4, G=4, P=128, N=32, state=True)),
    ("siso", dict(S=64, H=40, G=8, gate=False)),
    ("siso", dict(S=65, H=17, G=1, shared=False, state=True)),
    ("siso", dict(S=127, H=2, G=1, P=128, N=256, gate=False, state=True)),
    ("siso", dict(S=129, H=2, G=1, P=32, N=64, B=1)),
    ("siso", dict(S=300, H=4, G=4, state=True)),
    (1, dict(S=16, H=4, G=4, P=32, N=64, state=True)),
    (1, dict(S=63, H=1, G=1, N=256)),
    (1, dict(S=65, H=2, G=1, P=128, N=32, shared=False, gate=False)),
    (1, dict(S=129, H=17, G=1)),
    (2, dict(S=2, H=17, G=1, N=64, state=True)),
    (2, dict(S=17, H=2, G=1, N=32, state=True)),
    (2, dict(S=64, H=40, G=8, P=32, gate=False)),
    (2, dict(S=127, H=32, G=2, shared=False)),
    (2, dict(S=300, H=4, G=4, P=128, N=256, shared=False, state=True)),
    (4, dict(S=1, H=2, G=1, state=True)),
    (4, dict(S=2, H=40, G=8, state=True)),
    (4, dict(S=15, H=17, G=1, P=128, shared=False, state=True)),
    (4, dict(S=16, H=4, G=4, N=256, gate=False)),
    (4, dict(S=17, H=32, G=2, P=32)),
    (4, dict(S=65, H=2, G=1, N=32, state=True)),
    (4, dict(S=129, H=1, G=1, N=64, gate=False, shared=False)),
    (4, dict(S=300, H=4, G=4, state=True)),
    (8, dict(S=1, H=2, G=1, P=32, state=True)),
    (8, dict(S=7, H=2, G=1, N=256, state=True)),
    (8, dict(S=8, H=17, G=1, P=128)),
    (8, dict(S=9, H=4, G=2, N=64, gate=False)),
    (8, dict(S=16, H=4, G=4, N=32)),
    (8, dict(S=17, H=17, G=1, N=64, shared=False)),
    (8, dict(S=63, H=2, G=1, P=128, state=True)),
    (8, dict(S=64, H=40, G=8)),
    (8, dict(S=129, H=4, G=4, gate=False, state=True)),
    (8, dict(S=150, H=2, G=1, P=128, N=256, shared=False, state=True)),
]


@pytest.mark.parametrize("model, shape", SHAPES, ids=str)
def test_shapes(model, shape, poisoned):
    """Lengths about chunks and spans, every P, N and rank, heads that share groups, what is optional."""
    judge(model, draws(model, **shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(S=1, H=4, G=4, P=32, N=32, D="H P", softplus=False),
        dict(S=2, H=16, G=1, P=32, N=128, ends=[0, 1, 2, 2]),
        dict(S=3, H=1, G=1, N=256),
        dict(S=21, H=7, G=1, ends=[0, 2, 4, 5, 7, 7, 13, 14, 19, 20, 21]),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["mamba2", "siso", 4])
def test_short_sequences(model, shape, dtype, poisoned):
    """With initial states: log_decay's gradient, and A's, is little more than <S, dS> of these, which no sum evens out."""
    judge(model, draws(model, **shape, state=True, dtype=dtype))


@every_model
@pytest.mark.parametrize("N", [32, 128])
def test_fp16(model, N, poisoned):
    judge(model, draws(model, S=70, H=6, N=N, state=True, dtype=torch.float16))


@pytest.mark.parametrize("state", [False, True])
@every_model
def test_packed(model, state, poisoned):
    judge(model, draws(model, H=8, state=state, ends=PACKED))


@pytest.mark.parametrize("model, N", [("mamba2", 32), ("siso", 256), (1, 32), (2, 32), (4, 64), (8, 32)])
def test_packed_shapes(model, N, poisoned):
    judge(model, draws(model, H=8, P=128, N=N, shared=False, gate=False, state=True, ends=[0, 130, 131, 131, 150]))


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("ends", [None, [0, 0, 330, 330, 331, 800]], ids=["rows", "packed"])
@every_model
def test_segments(model, ends, spans, poisoned, monkeypatch):
    """Three or more, of one or two spans: sequences go over several and end within one."""
    monkeypatch.setattr(sizes, "SCRATCH", 0)
    monkeypatch.setattr(sizes, "LEAST_SPANS", spans)
    judge(model, draws(model, S=700, state=True, ends=ends))


@every_model
def test_packed_equals_separate(model, poisoned):
    """Bit for bit: nothing of a neighbour gets in, not even where both lie in the same 16 tokens."""
    made = inputs(model, state=True, ends=PACKED)
    if model != "mamba2":  # torch's product of the initial k and v may round otherwise for more sequences
        state = made["initial_state"]
        made["initial_state"] = state._replace(k=torch.zeros_like(state.k))
    dy = torch.randn_like(made["x"])

    def results(made, dy, dfinal):
        made = leaves(made)
        y, final = scan(model)(**made)
        outputs, read = [y, flatten([final])[0]], [made[name] for name in "xzBC"]
        return y, flatten([final]), torch.autograd.grad(outputs, read, [dy, dfinal])

    dfinal = torch.randn_like(flatten([made["initial_state"]])[0])
    y, final, gradients = results(made, dy, dfinal)
    for n, (start, end) in enumerate(pairwise(PACKED)):
        if start == end:
            continue
        part = narrowed(made, model, start, end)
        del part["cu_seqlens"]
        rows = [t[n : n + 1] for t in flatten([made["initial_state"]])]
        part["initial_state"] = rows[0] if model == "mamba2" else Mamba3State(*rows)
        y_n, final_n, gradients_n = results(part, dy[:, start:end], dfinal[n : n + 1])
        assert torch.equal(y_n, y[:, start:end]), n
        assert all(torch.equal(mine[0], whole[n]) for mine, whole in zip(final_n, final)), n
        for name, mine, whole in zip("xzBC", gradients_n, gradients):
            assert torch.equal(mine, whole[:, start:end]), (n, name)


@built_models
@pytest.mark.parametrize("name", ["x", "z", "B", "C", "dt"])
def test_a_nan_stays_in_its_sequence(model, name, poisoned):
    """Of three sequences that share chunks' worth of tokens, the middle one's."""
    made, along = inputs(model, state=True, ends=[0, 40, 61, 100]), tokens_of(model)
    bad = {**made, name: made[name].detach().clone()}
    bad[name].narrow(along[name], 40, 21).fill_(math.nan)
    want, got = everything(model, made), everything(model, leaves(bad))
    for key, t in want.items():
        name = "x" if key == "output 0" else key.split(":")[-1]
        if name in along:
            for start, end in ((0, 40), (61, 100)):
                pair = (each.narrow(along[name], start, end - start) for each in (got[key], t))
                assert torch.equal(*pair), key
        elif key.startswith("output") or name == "initial_state":
            assert torch.equal(got[key][[0, 2]], t[[0, 2]]), key


PARTS = ["y", "ssm", "k", "v", "angle"]


@pytest.mark.parametrize(
    "model, part", [(model, part) for model in ("siso", 2, 4) for part in PARTS] + [("mamba2", "y"), ("mamba2", "ssm")]
)
def test_gradients_of_one_output(model, part, poisoned):
    """Only y, or only one part of the final state, is read."""

    def read(result):
        y, final = result
        if part == "y":
            return y
        return final if model == "mamba2" else getattr(final, part)

    judge(model, draws(model, S=150, state=True), read)
    judge(model, draws(model, ends=[0, 20, 20, 150], state=True), read)


@every_model
def test_one_token_has_no_decay_to_learn(model, poisoned):
    """Without a state nothing decays: a gradient of zero, not of a rounding's size, where y alone is read."""
    made = inputs(model, S=1)
    y, _ = scan(model)(**made)
    (gradient,) = torch.autograd.grad(y.float().sum(), made["A" if model == "mamba2" else "log_decay"])
    assert not gradient.any()


def projected(made, margin, rows_first=True):
    """x, z, B, C as views of one projection [S, B, ·] (rows_first) or [B, S, ·], margin elements into its rows."""
    names = [name for name in "zxBC" if name in made]
    sections = [made[name].detach().flatten(2) for name in names]
    whole = torch.cat([sections[0].new_full((*sections[0].shape[:2], margin), math.nan), *sections], 2)
    if rows_first:
        whole = whole.transpose(0, 1).contiguous().transpose(0, 1)
    pieces = whole[..., margin:].split([t.shape[2] for t in sections], 2)
    views = {name: t.unflatten(2, made[name].shape[2:]) for name, t in zip(names, pieces)}
    return {**made, **{name: t.requires_grad_() for name, t in views.items()}}


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("margin", [0, 8, 1, 3], ids="{} elements in".format)
@built_models
def test_views_of_a_projection(model, margin, rows_first, poisoned):
    """Whether rows begin on 16 bytes or not: the bits of contiguous inputs."""
    made = inputs(model, S=70)
    views = projected(made, margin, rows_first)
    assert not any(views[name].is_contiguous() for name in "zxBC")
    dy = torch.randn_like(made["x"])

    def results(made):  # not outputs_and_gradients, which makes leaves of its own
        y, final = scan(model)(**made)
        names = [name for name, t in made.items() if isinstance(t, torch.Tensor)]
        weights = [dy, *map(torch.ones_like, flatten([final]))]
        gradients = torch.autograd.grad([y, *flatten([final])], [made[name] for name in names], weights)
        return {"y": y} | dict(zip(names, gradients))

    assert_same(results(views), results(made))


@pytest.mark.parametrize("dimension", range(4))
@built_models
def test_expanded(model, dimension, poisoned):
    """One row, token, head or group for all of them, at a stride of 0: the bits of contiguous inputs."""
    made = inputs(model, S=70)
    one = {name: made[name].detach().narrow(dimension, 0, 1).expand_as(made[name]) for name in "zxBC"}

    def results(**given):
        y, _ = scan(model)(**made | given)
        return {"y": y, "dt": torch.autograd.grad(y.sum(), made["dt"])[0]}

    assert_same(results(**one), results(**{name: t.contiguous() for name, t in one.items()}))


@built_models
def test_strides_of_gradients(model, poisoned):
    made = inputs(model, S=70, state=True)
    y, final = scan(model)(**made)
    outputs = [y, *flatten([final])]
    read = [t for t in flatten(list(made.values())) if t.requires_grad]

    def assert_equal(weights, others):
        pairs = (torch.autograd.grad(outputs, read, w, retain_graph=True) for w in (weights, others))
        assert all(map(torch.equal, *pairs))

    weights = [torch.randn_like(t) for t in outputs]
    assert_equal([t.mT.contiguous().mT for t in weights], weights)
    assert_equal([t.transpose(0, 1).contiguous().transpose(0, 1) for t in weights], weights)
    wide = torch.full((*y.shape[:3], y.shape[3] + 1), math.nan, dtype=y.dtype, device=DEVICE)
    wide[..., 1:] = weights[0]
    assert_equal([wide[..., 1:], *weights[1:]], weights)
    row = [weights[0][:, :1].expand_as(y), *weights[1:]]
    assert_equal(row, [row[0].contiguous(), *weights[1:]])
    ones = [torch.ones((), dtype=t.dtype, device=DEVICE).expand_as(t) for t in outputs]
    assert_equal(ones, [t.contiguous() for t in ones])


@pytest.mark.parametrize("model, S, log_width", [("mamba2", 50, 26), ("siso", 50, 26), (4, 17, 28)])
def test_beyond_32_bit_strides(model, S, log_width):
    """Rows so wide that a chunk's last token lies more than 2^31 elements after its first."""
    made = inputs(model, B=1, S=S, H=2, G=1)
    wide, at, far = torch.empty(S, 2**log_width, dtype=torch.bfloat16, device=DEVICE), 0, dict(made)
    for name in "xzBC":
        shape = made[name].shape[2:]
        piece = wide[None, :, at : at + shape.numel()].unflatten(2, shape)
        far[name] = piece.copy_(made[name].detach()).requires_grad_()
        at += shape.numel()

    def results(made):
        y, _ = scan(model)(**made)
        return y, *torch.autograd.grad(y, [made[name] for name in "xzBC"], torch.ones_like(y))

    assert all(map(torch.equal, results(far), results(made)))


def set_to(**values):
    """A change of inputs: each named one filled with a value, or by a function of itself."""

    def change(made):
        changed = {
            name: v(made[name].detach()) if callable(v) else torch.full_like(made[name], v)
            for name, v in values.items()
        }
        return {**made, **changed}

    return change


def some(value, one_in):
    """Every so manieth element is that value, by a fixed draw."""

    def change(t):
        generator = torch.Generator(DEVICE).manual_seed(7)
        drawn = torch.rand(t.shape, generator=generator, device=DEVICE) < 1 / one_in
        return torch.where(drawn, value, t)

    return change


def uniform(low, high):
    return lambda t: low + (high - low) * torch.rand_like(t)


@pytest.mark.parametrize("model", ["siso", 2, 4, 8])
def test_large_steps(model, poisoned):
    """dt of 5 to 20: angles turn several times a step."""
    judge(model, draws(model, set_to(dt=uniform(5, 20)), S=150, state=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["siso", 1, 4])
def test_strong_decays(model, dtype, poisoned):
    """log_decay of -1000 among others: what is left between them keeps its digits."""
    judge(model, draws(model, set_to(log_decay=some(-1000.0, 8)), S=150, state=True, dtype=dtype))


@pytest.mark.parametrize("model", ["siso", 4])
def test_only_strong_decays(model, poisoned):
    judge(model, draws(model, set_to(log_decay=-1000.0), S=150, state=True), lambda result: result[0])


def test_strong_decays_of_mamba2(poisoned):
    """A of -50 and dt up to 20."""
    change = set_to(A=uniform(-50, -1), dt=uniform(-3, 20))
    judge("mamba2", draws("mamba2", change, S=150, state=True))


@pytest.mark.parametrize("part", ["both", "y", "ssm"])
@pytest.mark.parametrize("rate", [0.5, 1.6, 4.0, 8.0])
@built_models
def test_steady_decays(model, rate, part, poisoned):
    """Every token forgets e^-rate: the decays' gradients are small beside <S, dS>, and must not be its rounding."""
    change = set_to(A=-rate, dt=1.0) if model == "mamba2" else set_to(log_decay=-rate)
    options = {"softplus": False} if model == "mamba2" else {}
    read = {"both": lambda r: r, "y": lambda r: r[0], "ssm": lambda r: flatten(r)[1]}[part]
    judge(model, draws(model, change, S=300, **options), read)


@pytest.mark.parametrize("model", ["mamba2", "siso", 2, 4])
def test_no_decay(model, poisoned):
    change = set_to(A=0.0) if model == "mamba2" else set_to(log_decay=0.0)
    judge(model, draws(model, change, S=1000, B=1, H=12))


@built_models
def test_tiny_steps(model, poisoned):
    """dt of 1e-6, without D, which would hide all else."""
    values = {"dt": 1e-6} if model != "mamba2" else {"dt": lambda t: t * 1e-7 + 1e-6}
    options = {"softplus": False} if model == "mamba2" else {}
    judge(model, draws(model, set_to(D=0.0, **values), S=150, **options))


@pytest.mark.parametrize("value", [-30.0, 30.0])
@pytest.mark.parametrize("model", ["siso", 2, 4])
def test_one_sided_trapezoid(model, value, poisoned):
    judge(model, draws(model, set_to(trap=value), S=150, state=True))


@every_model
def test_large_gates(model, poisoned):
    """Gates of ±50, and so far down that e^-z overflows."""

    def gates(t):
        for value, one_in in ((50.0, 4), (-50.0, 5), (-300.0, 6), (3000.0, 50)):
            t = some(value, one_in)(t)
        return t

    made = draws(model, set_to(z=gates), S=70)
    judge(model, made)
    assert all(t is None or t.isfinite().all() for t in everything(model, made[0]).values())


@pytest.mark.parametrize("model", ["siso", 4])
def test_long_turns(model, poisoned):
    """dt of 20 over 8192 tokens: the final angle's distance on the circle from float64's, beside PyTorch's in fp32."""
    made = set_to(dt=20.0)(inputs(model, S=8192, B=1, H=4, shared=False))
    with torch.no_grad():
        _, final = scan(model)(**made)
        steps = made["angles"].double().tanh().transpose(1, 2) * made["dt"].double()[..., None] / 2
        exact = steps.sum(2).frac() * 2 * math.pi
        _, plain = mamba3_reference.mamba3_scan(**made, compute_dtype=torch.bfloat16)

    def distance(angle):
        return torch.polar(torch.ones_like(exact), angle.double() - exact).angle().square().mean().sqrt()

    assert ((final.angle >= 0) & (final.angle <= 2 * math.pi + 1e-6)).all()
    assert distance(final.angle) <= 4 * distance(plain.angle)


@built_models
@pytest.mark.parametrize("ends", [None, [0, 30, 30, 90, 140]], ids=["rows", "packed"])
def test_later_tokens_change_nothing_before(model, ends, poisoned):
    """y is causal to the bit, wherever in a chunk the change begins."""
    made = inputs(model, S=140, ends=ends)
    along = tokens_of(model)
    with torch.no_grad():
        y, _ = scan(model)(**made)
        for t in (1, 7, 33, 77, 128, 139):
            changed = {name: v.detach().clone() if name in along else v for name, v in made.items()}
            for name, v in changed.items():
                if name in along:
                    later = v.narrow(along[name], t, 140 - t)
                    later.copy_(later.flip(along[name]) + 1 if name != "log_decay" else later.flip(2) - 1)
            got, _ = scan(model)(**changed)
            assert torch.equal(got[:, :t], y[:, :t]), t
            assert not torch.equal(got[:, t:], y[:, t:]), t


@pytest.mark.parametrize(
    "model, name",
    [(model, name) for model in ("siso", 4) for name in ("x", "z", "B", "C", "dt", "log_decay", "trap", "angles")]
    + [("mamba2", name) for name in ("x", "z", "B", "C", "dt")],
)
def test_a_nan_stays_behind_its_chunk(model, name, poisoned):
    """From token 128 on, a bound of every model's chunks and spans: y before it is as it was, to the bit."""
    made = inputs(model, S=200)
    bad = {**made, name: made[name].detach().clone()}
    bad[name].narrow(tokens_of(model)[name], 128, 72).fill_(math.nan)
    with torch.no_grad():
        y, got = scan(model)(**made)[0], scan(model)(**bad)[0]
    assert torch.equal(got[:, :128], y[:, :128])
    assert got[:, 128:].isnan().any()


@every_model
def test_no_gradient_after_the_last_that_is_read(model, poisoned):
    """dy is zero from a token on, and nothing reads the final state: all gradients of later tokens are zeros."""
    made = inputs(model, S=200, state=True)
    along = tokens_of(model)
    names = [name for name in along if name in made]
    y, _ = scan(model)(**made)
    for t in (1, 37, 128, 190):
        dy = torch.randn_like(y)
        dy[:, t:] = 0
        for name, gradient in zip(names, torch.autograd.grad(y, [made[n] for n in names], dy, retain_graph=True)):
            assert not gradient.narrow(along[name], t, 200 - t).any(), (name, t)
            assert gradient.narrow(along[name], 0, t).any(), (name, t)


@pytest.mark.parametrize("ends", [None, PACKED], ids=["rows", "packed"])
@every_model
def test_repeats_and_replays(model, ends):
    """One graph serves every value of that shape, the bounds of its sequences too."""
    other = [0, 70, 70, 70, 71, 90, 290, 300]

    def make(seed):
        bounds = (other if seed == 2 else ends) if ends else None
        return inputs(model, S=150, state=True, shared=ends is None, ends=bounds, seed=seed)

    same_bits(scan(model), make(0))
    replays(scan(model), make)


@pytest.mark.parametrize("model, N", [("mamba2", 64), ("siso", 32), (2, 64)])
def test_replays_without_states(model, N):
    """No state, no gate, heads that several blocks share: what is compiled at run time too."""
    replays(scan(model), lambda seed: inputs(model, S=70, H=34, G=1, P=128, N=N, gate=False, seed=seed))


@built_models
def test_two_at_once(model, poisoned):
    """Between a forward and its backward another call, and memory full of NaN; each backward twice."""

    def forward(made):
        outputs = flatten(scan(model)(**made))
        return (
            outputs,
            [t for t in flatten(list(made.values())) if t.requires_grad],
            [torch.ones_like(t) for t in outputs],
        )

    both = inputs(model, S=200, state=True), inputs(model, S=130, H=4, seed=1)
    wants = [torch.autograd.grad(*forward(made)) for made in both]
    started = [forward(made) for made in both]
    junk = [torch.full((2**n,), math.nan, device=DEVICE) for n in range(8, 25)]
    del junk
    for _ in range(2):
        for pending, want in zip(started, wants):
            assert all(map(torch.equal, torch.autograd.grad(*pending, retain_graph=True), want))


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@built_models
def test_dtypes(model, parameters, poisoned):
    """dt, decays, angles, biases and states in another dtype than x's; gradients are in their arguments' dtypes."""
    made = inputs(model, S=70, state=True, parameters=parameters)
    judge(model, [made] + [inputs(model, S=70, state=True, parameters=parameters, seed=n) for n in (1, 2)])
    y, final = scan(model)(**made)
    assert y.dtype == torch.bfloat16 and {t.dtype for t in flatten([final])} == {torch.float32}
    (y.float().sum() + sum(t.sum() for t in flatten([final]))).backward()
    for t in flatten(list(made.values())):
        assert t.grad is None or t.grad.dtype == t.dtype


@built_models
def test_without_gradients(model, poisoned):
    """What isn't saved changes nothing of what is computed."""
    made = inputs(model, S=200, state=True)
    want = flatten(scan(model)(**made))
    with torch.no_grad():
        assert all(map(torch.equal, flatten(scan(model)(**made)), want))


@built_models
def test_in_two_parts(model, poisoned):
    """From the state that the first part leaves: for every way to cut, as near as in one."""
    made = draws(model, S=200, state=True)

    def parts(at):
        def run(initial_state, **made):
            first, between = scan(model)(**narrowed(made, model, 0, at), initial_state=initial_state)
            second, final = scan(model)(**narrowed(made, model, at, 200), initial_state=between)
            return torch.cat((first, second), 1), final

        return run

    for at in (1, 64, 129):
        judge(model, made, run=parts(at), factor=3.0)


@built_models
def test_the_recipe(model):
    """2 x 4096 tokens, 128 heads, 8 groups: y beside fp32's; a row of the batch is what it is alone, gradients too."""
    made = inputs(model, S=4096, H=128, G=8)
    with torch.no_grad():
        results = [scan(model)(**made)]
        results += [definition(model)(**made, compute_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
        for mine, plain, exact in list(zip(*map(flatten, results)))[:2]:  # y and the state
            assert error(mine, exact) <= 2 * error(plain, exact)
    rows = tokens_of(model)
    alone = leaves({name: t[1:] if name in rows else t for name, t in made.items()})
    (y, _), (row, _) = scan(model)(**made), scan(model)(**alone)
    assert torch.equal(row, y[1:])
    dy, names = torch.randn_like(y), ["x", "z", "B", "C"]
    whole = torch.autograd.grad(y, [made[name] for name in names], dy)
    of_row = torch.autograd.grad(row, [alone[name] for name in names], dy[1:])
    for name, mine, theirs in zip(names, of_row, whole):
        assert torch.equal(mine, theirs[1:]), name


def test_beyond_32_bit_offsets():
    """More than 2^31 elements of x: the last tokens and their gradients are those of a run from the state before."""
    S, last, H, P, N = 1025 * 128 + 320, 320, 128, 128, 32  # chunks of 64 tokens begin alike in both
    x = torch.empty(1, S, H, P, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    assert x.numel() > 2**31
    B, C = (torch.randn(1, S, 1, N, dtype=torch.bfloat16, device=DEVICE) * N**-0.25 for _ in range(2))
    dt, A = torch.rand(1, S, H, device=DEVICE) / 4, -torch.rand(H, device=DEVICE) - 0.01
    dy = torch.randn(1, 1, H, P, dtype=torch.bfloat16, device=DEVICE)  # one token's for all: a stride of 0
    run = scan("mamba2")
    with torch.no_grad():
        state = run(x[:, :-last], dt[:, :-last], A, B[:, :-last], C[:, :-last])[1]
    end = x.detach()[:, -last:].clone().requires_grad_()
    y_end, final_end = run(end, dt[:, -last:], A, B[:, -last:], C[:, -last:], initial_state=state)
    (dx_end,) = torch.autograd.grad(y_end, end, dy.expand_as(y_end))
    y, final = run(x, dt, A, B, C)
    assert torch.equal(final, final_end) and torch.equal(y[:, -last:], y_end)
    assert all(piece.isfinite().all() for piece in y.split(8192, 1))
    (dx,) = torch.autograd.grad(y, x, dy.expand_as(y))
    assert torch.equal(dx[:, -last:], dx_end)
    assert all(piece.isfinite().all() for piece in dx.split(8192, 1))


@pytest.mark.parametrize("model, S", [("mamba2", 520), (4, 260)])
def test_more_spans_than_a_grid_has_rows(model, S):
    """Five or nine a row: in several segments. y is what 100 rows give, gradients but for a segment's rounding."""
    made = inputs(model, B=16_000, S=S, H=1, G=1, P=32, N=32)
    few = leaves({name: t[-100:] if name in tokens_of(model) else t for name, t in made.items()})
    (y, _), (last, _) = scan(model)(**made), scan(model)(**few)
    assert torch.equal(last, y[-100:])
    names = ["x", "z", "B", "C", "dt"]
    (many, want), dy = (([each[name] for name in names]) for each in (made, few)), torch.randn_like(y)
    for name, mine, exact in zip(names, torch.autograd.grad(y, many, dy), torch.autograd.grad(last, want, dy[-100:])):
        assert mine.isfinite().all(), name
        assert error(mine[-100:], exact) < 0.02, name


@pytest.mark.parametrize("model", ["siso", 4])
def test_compiles(model):
    """In one graph, forward and backward."""
    torch._dynamo.reset()
    made, run = inputs(model, S=70, state=True), scan(model)

    def layer(**made):
        return run(**made)

    assert_same(
        everything(model, made, torch.compile(layer, fullgraph=True, backend="aot_eager")), everything(model, made)
    )
