"""The scan around the CUDA kernels: numbers before them, gradients behind them, with the kernels in plain PyTorch."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st

from nam56r.kernels import extension, nvrtc
from nam56r.kernels.mamba2 import cuda as mamba2_cuda
from nam56r.kernels.mamba2 import reference as mamba2_reference
from nam56r.kernels.mamba3 import Mamba3State
from nam56r.kernels.mamba3 import cuda as mamba3_cuda
from nam56r.kernels.mamba3 import reference as mamba3_reference
from nam56r.kernels.registry import DEVICES, Problem, Spec, candidates, select
from nam56r.kernels.ssd import code, cuda, sizes
from nam56r.kernels.ssd.code import PASSES, Code, Shape
from nam56r.kernels.ssd.sizes import sizes_of, turns_of
from nam56r.kernels.testing import agree, flatten, outputs_and_gradients
from nam56r.problems import Workload
from nam56r.recipe import PRESETS
from tests.kernels import ssd_emulation

IMPLEMENTATIONS = torch.library.Library("nam56r", "IMPL")
IMPLEMENTATIONS.impl("ssd_scan", cuda._scan, "CPU")
IMPLEMENTATIONS.impl("ssd_scan_backward", cuda._scan_backward, "CPU")


launch = cuda.launch


@pytest.fixture(autouse=True)
def emulated(interpreter, poisoned, monkeypatch):
    """Triton in its interpreter, the CUDA kernels in PyTorch, NaN in memory that nobody wrote."""
    monkeypatch.setattr(cuda, "launch", ssd_emulation.launch)


def mamba3_inputs(
    B=2, S=37, H=4, G=2, P=32, N=32, R=None, *, shared=True, gate=True, state=False, ends=None, dtype=torch.float64,
):  # fmt: skip
    """R: MIMO rank, None for SISO; ends: packed bounds, of B 1."""
    generator = torch.Generator().manual_seed(S)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n, rank = B if ends is None else len(ends) - 1, R or 1
    dt = F.softplus(draw(B, S, H) - 1).transpose(1, 2)
    made = {
        "x": draw(B, S, H, P),
        "B": draw(B, S, rank, G, N) / 4,
        "C": draw(B, S, rank, G, N) / 4,
        "dt": dt,
        "log_decay": -dt * torch.rand(B, H, S, generator=generator, dtype=torch.float64),
        "trap": draw(B, H, S),
        "angles": draw(B, S, 1 if shared else H, N // 4),
        "B_bias": draw(H, rank, N) / 4,
        "C_bias": draw(H, rank, N) / 4,
        "D": draw(H),
    }
    if gate:
        made["z"] = draw(B, S, H, P)
    if R:
        made["mimo"] = tuple(draw(H, R, P) for _ in range(3))
    if state:
        shapes = (H, P, N), (H, rank, N), (H, rank, P), (H, N // 4)
        made["initial_state"] = Mamba3State(*(draw(n, *shape) for shape in shapes))
    return with_gradients(made, ends)


def mamba2_inputs(B=2, S=37, H=4, G=2, P=32, N=32, *, D="H", gate=True, softplus=True, state=False, ends=None):
    generator = torch.Generator().manual_seed(S)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = B if ends is None else len(ends) - 1
    dt = draw(B, S, H) - 2
    made = {"x": draw(B, S, H, P), "dt": dt if softplus else dt.exp(), "A": -draw(H).exp()}
    made |= {"B": draw(B, S, G, N) / 4, "C": draw(B, S, G, N) / 4, "dt_softplus": softplus}
    if D:
        made["D"] = draw(H) if D == "H" else draw(H, P)
    if gate:
        made["z"] = draw(B, S, H, P)
    if softplus:
        made["dt_bias"] = draw(H) / 2
    if state:
        made["initial_state"] = draw(n, H, P, N)
    return with_gradients(made, ends)


def with_gradients(made, ends):
    for value in made.values():
        for t in value if isinstance(value, tuple) else (value,):
            if isinstance(t, torch.Tensor):
                t.requires_grad_()
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    return made


def assert_equal(run, definition, made, tolerance=1e-9):
    got, got_gradients = outputs_and_gradients(run, made, None)
    want, want_gradients = outputs_and_gradients(definition, made, None)
    assert got_gradients.keys() == want_gradients.keys()
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)
    for name, exact in want_gradients.items():
        mine = got_gradients[name]
        if exact is None or mine is None:  # what nothing reads
            assert all(t is None or not t.any() for t in (mine, exact)), name
            continue
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


mamba3 = partial(assert_equal, mamba3_cuda.mamba3_scan, mamba3_reference.mamba3_scan)
mamba2 = partial(assert_equal, mamba2_cuda.mamba2_scan, mamba2_reference.mamba2_scan)
PACKED = {"B": 1, "S": 150, "ends": [0, 0, 1, 133, 133, 150, 150]}
RANKS = [None, 1, 2, 4, 8]


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("shape", [{"S": 1}, {"S": 37, "state": True}, {"S": 131, "B": 1}], ids=str)
def test_mamba3(R, shape):
    """Values and every gradient, through y and every part of the final state."""
    mamba3(mamba3_inputs(R=R, **shape))


@pytest.mark.parametrize("R, state", [(None, False), (None, True), (1, True), (2, False), (4, True), (8, True)])
def test_mamba3_packed(R, state):
    """Empty sequences at both ends and between, one of one token, spans that no sequence uses."""
    mamba3(mamba3_inputs(R=R, state=state, **PACKED))


@pytest.mark.parametrize(
    "R, shape",
    [
        (None, {"shared": False}),
        (2, {"shared": False, "state": True, **PACKED}),
        (None, {"gate": False}),
        (2, {"gate": False}),
        (None, {"P": 128, "H": 2, "state": True}),
        (4, {"P": 128, "H": 2, "state": True, **PACKED}),
        (2, {"P": 128, "H": 2, "shared": False, "B": 1}),
        (None, {"H": 17, "G": 1, "B": 1, "S": 9}),
        (2, {"H": 40, "G": 2, "B": 1, "S": 9, "shared": False}),
        (4, {"H": 12, "G": 1, "P": 128, "B": 1, "S": 9, "state": True}),
        (None, {"N": 64, "G": 4}),
        (8, {"P": 128, "H": 2, "shared": False, "B": 1}),
    ],
    ids=str,
)
def test_mamba3_shapes(R, shape):
    """Angles a head, no gate, two units a head, groups shared by several blocks."""
    mamba3(mamba3_inputs(R=R, **shape))


@pytest.mark.parametrize(
    "shape",
    [
        {"S": 1},
        {"S": 131, "D": "H P", "state": True},
        {"D": None, "gate": False},
        {"softplus": False},
        {"P": 128, "H": 2, "D": "H P"},
        {"H": 40, "B": 1, "S": 9},
        {**PACKED},
        {"state": True, **PACKED},
    ],
    ids=str,
)
def test_mamba2(shape):
    mamba2(mamba2_inputs(**shape))


LONG = {"B": 1, "S": 420, "ends": [0, 0, 300, 300, 420], "H": 2}  # several spans of rank 1 too


@pytest.mark.parametrize("spans, final", [(1, True), (2, False)])
@pytest.mark.parametrize(
    "R, shape",
    [
        (None, {"S": 700, "H": 2, "state": True}),
        (None, {**LONG, "state": True}),
        (2, {**PACKED}),
        (4, {"S": 150, "P": 128, "H": 2}),
        (4, {**PACKED, "state": True}),
        (8, {"S": 131, "H": 2, "gate": False, "state": True}),
        (8, {**PACKED, "state": True, "shared": False, "H": 2}),
        ("mamba2", {"S": 700, "H": 2, "state": True}),
        ("mamba2", {**LONG, "state": True}),
    ],
    ids=str,
)
def test_segments(R, shape, final, spans, monkeypatch):
    """Three or more, the last first: sequences go over several or end within one; the final state is read or not."""
    started = []

    def recorded(kernels, sizes, fields):
        if kernels != ("turns",):
            started.append(fields.get("segment"))
        assert sizes.segment_spans <= spans
        ssd_emulation.launch(kernels, sizes, fields)

    def read(scan):
        return scan if final else lambda **made: scan(**made)[0]

    monkeypatch.setattr(cuda, "launch", recorded)
    monkeypatch.setattr(sizes, "SCRATCH", 0)
    monkeypatch.setattr(sizes, "LEAST_SPANS", spans)
    made = mamba2_inputs(**shape) if R == "mamba2" else mamba3_inputs(R=R, **shape)
    run, definition = (mamba2 if R == "mamba2" else mamba3).args
    assert_equal(read(run), read(definition), made)
    whole, *segments = started
    assert whole is None and len(segments) >= 3 and segments == sorted(segments, reverse=True) and segments[-1] == 0


@pytest.mark.parametrize("R", [None, 2, 8, "mamba2"])
def test_no_gradient_after_the_last_that_is_read(R):
    """Exactly: dy is zero from a token on, and nothing reads the final state."""
    made = mamba2_inputs(S=90, state=True) if R == "mamba2" else mamba3_inputs(R=R, S=90, state=True)
    y, _ = (mamba2 if R == "mamba2" else mamba3).args[0](**made)
    along = {"x": 1, "z": 1, "B": 1, "C": 1, "angles": 1, "trap": 2, "log_decay": 2, "dt": 1 if R == "mamba2" else 2}
    names = [name for name in along if name in made]
    for t in (1, 37, 64):
        dy = torch.randn_like(y)
        dy[:, t:] = 0
        for name, gradient in zip(names, torch.autograd.grad(y, [made[n] for n in names], dy, retain_graph=True)):
            assert not gradient.narrow(along[name], t, 90 - t).any(), (name, t)
            assert gradient.narrow(along[name], 0, t).any(), (name, t)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("part", ["y", "ssm", "k", "v", "angle"])
def test_gradients_of_one_output(part, state):
    """What isn't read gives no gradient to the operator, not a zero one."""

    def alone(scan):
        def run(**made):
            y, final = scan(**made)
            return y if part == "y" else getattr(final, part)

        return run

    made = mamba3_inputs(R=2, S=20, state=state)
    assert_equal(alone(mamba3_cuda.mamba3_scan), alone(mamba3_reference.mamba3_scan), made)


def test_long_softplus():
    """Mamba-2's step where exp overflows, and where 1 + exp(t) is 1."""
    made = mamba2_inputs(S=64)
    with torch.no_grad():
        made["dt"][:, ::7] = -60
        made["dt"][:, 3::7] = 60
        made["A"] /= 100
    mamba2(made)


@pytest.mark.parametrize("R, dtype", [(None, torch.float16), (4, torch.bfloat16)])
def test_low_precision(R, dtype):
    """16-bit x, B, C, z beside fp32, dt in yet another dtype: results and gradients have their arguments' dtypes."""
    made = mamba3_inputs(R=R, S=70, B=1, state=True)
    narrow = ("x", "B", "C", "z", "dt")

    def rounded(name, t):
        return t.detach().to(dtype if name in narrow else torch.float32).requires_grad_()

    made = {
        name: type(value)(*(rounded(name, t) for t in value)) if hasattr(value, "_fields")
        else tuple(rounded(name, t) for t in value) if isinstance(value, tuple)
        else rounded(name, value)
        for name, value in made.items()
    }  # fmt: skip
    same_dtype = partial(mamba3_reference.mamba3_scan, compute_dtype=dtype)
    agree(mamba3_cuda.mamba3_scan, mamba3_reference.mamba3_scan, made, same_dtype=same_dtype)
    y, final = mamba3_cuda.mamba3_scan(**made)
    assert y.dtype == dtype and {t.dtype for t in final} == {torch.float32}
    y.float().sum().backward()
    for t in flatten(list(made.values())):
        assert t.grad is None or t.grad.dtype == t.dtype


def strided(t):
    """The same values a few elements into wider rows, the first two dimensions swapped in memory."""
    wide = t.new_zeros(*t.shape[1::-1], *t.shape[2:-1], t.shape[-1] + 5)
    wide[..., 3 : 3 + t.shape[-1]] = t.transpose(0, 1)
    return wide.transpose(0, 1)[..., 3 : 3 + t.shape[-1]]


@pytest.mark.parametrize("R", [None, 4])
def test_any_strides(R):
    """Rows that don't begin on 16 bytes are copied; the gradient of each is the same as of a contiguous one."""

    def scan(**made):
        names = [name for name, t in made.items() if isinstance(t, torch.Tensor) and t.ndim > 2 and "bias" not in name]
        return mamba3_cuda.mamba3_scan(**made | {name: strided(made[name]) for name in names})

    assert_equal(scan, mamba3_reference.mamba3_scan, mamba3_inputs(R=R, S=40, shared=R is None))


def test_a_projection_is_not_copied():
    """Views of one projection's rows on 16 bytes go to the kernels as they lie."""
    whole = torch.randn(2, 20, 256, dtype=torch.bfloat16)
    x, B = whole[..., :128].unflatten(-1, (4, 32)), whole[..., 128:].unflatten(-1, (1, 4, 32))
    assert cuda.dense(x) is x and cuda.dense(B) is B
    assert cuda.dense(x[..., 1:]) is not x and cuda.dense(x.mT).stride(-1) == 1
    one = x[:, :1].expand_as(x)
    assert cuda.dense(one) is one and cuda.dense(one, apart=True).is_contiguous()
    assert cuda.dense(x[:1, :1], apart=True).data_ptr() == x.data_ptr()
    assert cuda.gradient_like(B).stride(-1) == 1 and cuda.gradient_like(B.mT).stride(-1) == 1


@pytest.mark.parametrize("B, S", [(2, 0), (0, 5)])
@pytest.mark.parametrize("R", [None, 2])
def test_no_tokens(B, S, R):
    made = mamba3_inputs(B=B, S=S, R=R, state=True)
    y, final = mamba3_cuda.mamba3_scan(**made)
    assert y.shape == (B, S, 4, 32)
    assert all(map(torch.equal, final, made["initial_state"]))
    (y.sum() + sum(t.sum() for t in final)).backward()
    assert all((t.grad == 1).all() for t in made["initial_state"])
    assert mamba3_cuda.mamba3_scan(**mamba3_inputs(B=1, S=0, ends=[0]))[1].ssm.shape == (0, 4, 32, 32)
    y, final = mamba2_cuda.mamba2_scan(**(made := mamba2_inputs(B=B, S=S, state=True)))
    assert torch.equal(final, made["initial_state"])
    assert not mamba2_cuda.mamba2_scan(**mamba2_inputs(B=1, S=0, ends=[0, 0]))[1].any()


def test_without_gradients_nothing_is_saved():
    seen = []

    def recorded(kernels, sizes, fields):
        seen.append(fields)
        ssd_emulation.launch(kernels, sizes, fields)

    made = mamba3_inputs(S=20)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cuda, "launch", recorded)
        mamba3_cuda.mamba3_scan(**made)
    (fields,) = seen
    assert (fields["save"], fields["saved"], fields["bases"]) == (0, None, None)


@pytest.mark.parametrize("ends, H", [(None, 17), ([0, 0, 7, 20], 2)])
def test_registered(ends, H, monkeypatch):
    """What torch.compile is told of shapes, dtypes, strides and gradients is so."""
    outputs = cuda._outputs
    monkeypatch.setattr(cuda, "_outputs", lambda *given: tuple(t.zero_() for t in outputs(*given)))  # NaN equals no NaN
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    made = mamba3_inputs(B=1 if ends else 2, S=20, H=H, G=1, R=2, state=True, ends=ends)
    state, mimo, bounds = made.pop("initial_state"), made.pop("mimo"), made.pop("cu_seqlens", None)
    x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z = made.values()
    turned = (x, B, C, dt, log_decay, trap, angles, None, None, False, B_bias, C_bias, D, z, *mimo)
    states = state.ssm, state.angle, bounds, True
    torch.library.opcheck(torch.ops.nam56r.ssd_scan, (*turned, *states), test_utils=checks)
    made = mamba2_inputs(B=1 if ends else 2, S=20, H=H, G=1)
    x, dt, A, B, C, _, D, z, bias = made.values()
    plain = (x, B.unsqueeze(2), C.unsqueeze(2), dt.transpose(1, 2), None, None, None, A, bias, True, None, None, D, z)
    torch.library.opcheck(torch.ops.nam56r.ssd_scan, (*plain, *[None] * 5, bounds, True), test_utils=checks)


def test_fields_are_the_kernels():
    """Names and order of struct Arguments in csrc/ssd."""
    text = (nvrtc.SOURCES / "ssd" / "arguments.cuh").read_text()
    body = re.search(r"struct Arguments \{(.*?)\};", text, re.DOTALL)[1]
    declared = re.findall(r"(?:void|long long) ([^;]+);", body)
    assert cuda.FIELDS == tuple(name.strip(" *") for line in declared for name in line.split(","))


@pytest.mark.parametrize("ends", [None, [0, 0, 7, 20]])
def test_traced(ends):
    """One graph, whose results and gradients are eager's."""
    torch._dynamo.reset()
    made = mamba3_inputs(B=1 if ends else 2, S=20, H=2, G=1, R=2, state=True, ends=ends)
    traced = torch.compile(mamba3_cuda.mamba3_scan, fullgraph=True, backend="aot_eager")
    assert_equal(traced, mamba3_cuda.mamba3_scan, made)
    torch._dynamo.reset()
    made = mamba2_inputs(B=1 if ends else 2, S=20, H=2, G=1, ends=ends)
    traced = torch.compile(mamba2_cuda.mamba2_scan, fullgraph=True, backend="aot_eager")
    assert_equal(traced, mamba2_cuda.mamba2_scan, made)


def test_recomputed():
    """Under activation recompute, and with what is saved packed away and read once."""
    reads = []

    def checkpointed(**made):
        inside = lambda *leaves: mamba3_cuda.mamba3_scan(**dict(zip(made, leaves)))  # noqa: E731
        return torch.utils.checkpoint.checkpoint(inside, *made.values(), use_reentrant=False)

    def packed_away(**made):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: reads.append(t.data_ptr()) or t):
            return mamba3_cuda.mamba3_scan(**made)

    made = mamba3_inputs(S=20, H=2, G=1, R=2)
    assert_equal(checkpointed, mamba3_cuda.mamba3_scan, made)
    assert_equal(packed_away, mamba3_cuda.mamba3_scan, made)
    assert len(reads) == len(set(reads)) > 15


SHAPE = Shape(torch.bfloat16, 2, 4, 128)


def test_launched(monkeypatch):
    """What the extension's launcher gets: addresses and numbers by FIELDS, and each kernel's grid."""
    launched = []
    ours = dict(forward=Code(5, 256, 1000), turns=Code(8, 128, 0), walk=Code(6, 256, 6), gradient=Code(7, 512, 7))
    loaded = {kernels: {kernel: ours[kernel] for kernel in kernels} for kernels in PASSES}
    monkeypatch.setattr(cuda, "code", lambda kernels, shape, capability: loaded[kernels])
    monkeypatch.setattr(torch.ops.nam56r, "ssd_launch", lambda *given: launched.append(given), raising=False)
    x, B = torch.zeros(2, 70, 34, 128, dtype=torch.bfloat16), torch.zeros(2, 70, 4, 2, 64, dtype=torch.bfloat16)
    sizes = sizes_of(2, x, B, torch.zeros(2, 70, 1, 16), None)
    fields = {"x": x, "D": x[1:], "saved": None, "S": 70, "a_h": 3}
    for kernels in loaded:
        launch(kernels, sizes, fields)
    # 17 heads of 2 units, 2 at a time; 3 spans of 32 tokens
    assert [given[1:11] for given in launched] == [
        (5, False, True, 4, 64, 68, 2, 1, 256, 1000), (8, False, False, 4, 64, 5, 2 * 3, 2, 128, 0),
        (6, False, True, 4, 64, 68, 2, 2, 256, 6), (7, False, False, 4, 64, 2 * 17, 2 * 3, 1, 512, 7),
    ]  # fmt: skip
    for on, *_, numbers in launched:
        assert on is x and len(numbers) == len(cuda.FIELDS)
        given = {name: number for name, number in zip(cuda.FIELDS, numbers) if number}
        assert given == {"x": x.data_ptr(), "D": x[1:].data_ptr(), "S": 70, "a_h": 3}


def test_compiled_at_run_time(monkeypatch):
    """A pass that isn't built ahead is one unit of its kernels, whose handles come in their order."""
    asked = []

    def compiled(family, header, names, arch):
        asked.append((family, header, arch, names))
        return SimpleNamespace(names={name: f"symbol of {name}" for name in names}), b"content"

    monkeypatch.setattr(code, "built", lambda *given: False)
    monkeypatch.setattr(code, "shared_bytes", lambda kernel, shape: len(kernel))
    monkeypatch.setattr(nvrtc, "compile", compiled)
    monkeypatch.setattr(nvrtc, "arch_of", lambda capability: "sm_90a")
    load = lambda content, names: [names.index(name) + 10 for name in names]  # noqa: E731
    monkeypatch.setattr(torch.ops.nam56r, "ssd_load", load, raising=False)
    made = code.code.__wrapped__(code.PASSES[1], SHAPE, (9, 0))
    assert {kernel: one[::2] for kernel, one in made.items()} == dict(turns=(10, 5), walk=(11, 4), gradient=(12, 8))
    arguments = "<nam56r::BFloat16, 2, 4, 128>"
    names = [f"nam56r::ssd::{kernel}{arguments}" for kernel in ("turns", "walk", "gradient")]
    assert asked == [("ssd", "kernels.cuh", "sm_90a", names)]
    assert code.name_of("walk", SHAPE) == "walk<bf16,2,4,128>"


@pytest.mark.parametrize("kernel", [kernel for kernels in code.PASSES for kernel in kernels])
def test_threads_are_the_kernels(kernel):
    """What a block is launched with is what its kernel in csrc/ssd is bounded to."""
    text = (nvrtc.SOURCES / "ssd" / f"{kernel}.cuh").read_text()
    assert int(re.search(rf"__launch_bounds__\((\d+)\b.*\) {kernel}\(", text)[1]) == code.THREADS[kernel]


built = pytest.mark.skipif(not code.REGISTERED, reason="the extension isn't built")


@built
@pytest.mark.parametrize("preset", ["nam56r", "nam56r-3584", "nam56r-quarter"])
@pytest.mark.parametrize("kind, rank", [("mamba3", 4), ("mamba3", 1), ("mamba2", 4)])
@pytest.mark.parametrize("device", ["h100", "h200"])
def test_the_recipes_shapes_are_built_ahead(preset, kind, rank, device, monkeypatch):
    """In bf16, both as the recipe has it and with the other kinds of M: nothing is compiled at run time."""
    monkeypatch.setattr(nvrtc, "missing", lambda: "no compiler")
    recipe = PRESETS[preset].with_overrides([f"mamba.kind={kind}", f"mamba.mimo_rank={rank}"])
    operators = Workload(recipe, 1, 1, torch.bfloat16).operators(kind)
    (scan,) = operators.keys() & {"mamba2_scan", "mamba3_scan"}
    assert candidates(scan)[0].refuses(Problem.of(scan, DEVICES[device], **operators[scan])) == ()


@built
def test_what_is_not_built_ahead_needs_the_compiler(monkeypatch):
    others = [{"dtype": torch.float16}, {"R": 2}, {"N": 64}, {"R": 8}, {"operator": "mamba2_scan", "N": 256}]
    refuses = [(candidates(change.get("operator", "mamba3_scan"))[0].refuses, asked(**change)) for change in others]
    assert not any(refused(problem) for refused, problem in refuses)
    remedy = "CuPy is not installed: pip install nam56r[nvrtc]"
    monkeypatch.setattr(nvrtc, "missing", lambda: remedy)
    assert [refused(problem) for refused, problem in refuses] == [(remedy,)] * len(others)
    assert candidates("mamba3_scan")[0].refuses(asked(P=32)) == ()  # any P runs on the same code


@built
def test_shared_memory_fits_the_device():
    shapes = [Shape(torch.bfloat16, 2, rank, d_state) for rank in code.RANKS for d_state in code.STATES]
    shapes += [Shape(torch.float16, model, 1, d_state) for model in (0, 1) for d_state in code.STATES]
    assert not {shape: why for shape in shapes if (why := code.refusal(shape, "h200", (9, 0)))}


@built
@pytest.mark.parametrize("shape", [Shape(torch.float16, 0, 1, 32), Shape(torch.bfloat16, 2, 2, 64)], ids=str)
def test_compiles(shape, tmp_path, monkeypatch):
    """What is handed to the loader: a CUBIN with the kernels of a pass."""
    given_over = []
    monkeypatch.setattr(nvrtc, "folder", lambda: tmp_path)
    load = lambda content, names: given_over.append((content, names)) or range(len(names))  # noqa: E731
    monkeypatch.setattr(torch.ops.nam56r, "ssd_load", load)
    for kernels in code.PASSES:
        assert len(code.code.__wrapped__(kernels, shape, (9, 0))) == len(kernels)
        content, names = given_over.pop()
        elf = content.numpy().tobytes()
        assert elf.startswith(b"\x7fELF")
        for name, kernel in zip(names, kernels, strict=True):
            assert kernel in name and f".text.{name}\0".encode() in elf
    assert {unit.family for unit in nvrtc.cached()} == {"ssd"} and len(nvrtc.cached()) == 2


@given(
    st.integers(1, 3), st.integers(0, 700), st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 2]),
    st.integers(1, 6), st.integers(1, 40), st.sampled_from([32, 64, 128]), st.lists(st.integers(0, 700), max_size=5),
)  # fmt: skip
def test_sizes(batch, length, rank, model, groups, heads_per_group, headdim, bounds):
    """Units divide a group's; spans have numbers of their own, of which a sequence's follow one another; parts too."""
    heads = groups * heads_per_group
    B = torch.empty(batch, length, rank, groups, 32, device="meta")
    one = sizes_of(model, torch.empty(batch, length, heads, headdim, device="meta"), B, None, None)
    assert one.units * one.splits * groups == one.all_units == heads * max(1, headdim // 64)
    assert one.units <= 16 and one.every in (1, 2) and one.span == one.every * one.chunk and one.chunk * rank == 64
    assert one.total == batch * one.spans and one.spans * one.span >= length > (one.spans - 1) * one.span
    ends = torch.tensor(sorted({*bounds, 0} | {length}))
    ends = ends[ends <= length]
    packed = sizes_of(model, torch.empty(1, length, heads, headdim, device="meta"), B[:1], None, ends)
    first = ends // packed.span + torch.arange(len(ends))
    taken = -(-ends.diff() // packed.span)
    assert first[-1] == packed.total and ((first[:-1] + taken) <= first[1:]).all()
    parts = [
        i + s
        for i, (begin, spans) in enumerate(zip(first.tolist(), taken.tolist()))
        for s in sorted({number // packed.segment_spans for number in range(begin, begin + spans)})
    ]
    assert len(set(parts)) == len(parts) and max(parts, default=0) < packed.parts


@given(st.integers(0, 10**7), st.integers(1, 65535), st.integers(1, 256), st.sampled_from([32, 256]), st.booleans())
def test_segments_fit_a_grid_and_memory(length, sequences, heads, d_state, packed):
    batch = 1 if packed else sequences
    x, B = (torch.empty(batch, length, *shape, device="meta") for shape in ((heads, 64), (4, 1, d_state)))
    ends = torch.empty(sequences + 1, device="meta") if packed else None
    one = sizes_of(2, x, B, torch.empty(batch, length, 1, d_state // 4, device="meta"), ends)
    assert one.segments * one.segment_spans >= one.spans and (one.segments - 1) * one.segment_spans < max(1, one.spans)
    assert one.places <= 65535
    chunks = one.places * one.every
    memory = 2 * chunks * one.all_units * one.tile * 2 + chunks * one.heads * one.turns * 4
    assert memory <= sizes.SCRATCH or one.segment_spans <= 8


@pytest.mark.parametrize("rank, chunks, segments", [(4, 512, 8), (1, 128, 4)])
def test_the_recipes_segments_are_whole_waves(rank, chunks, segments):
    """B2 S4096 H128 G8: as many chunks as memory has room for, in spans that give 128 blocks or 256 a segment."""
    x, B = torch.empty(2, 4096, 128, 64, device="meta"), torch.empty(2, 4096, rank, 8, 128, device="meta")
    one = sizes_of(1 if rank == 1 else 2, x, B, torch.empty(2, 4096, 1, 32, device="meta"), None)
    assert (one.chunks, one.segments) == (chunks, segments)
    assert one.places * one.groups * one.splits % 128 == 0 and one.segments * one.segment_spans == one.spans


@built
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("d_state", [32, 64, 128, 256])
def test_turns_take_what_the_kernels_say(rank, d_state):
    """Bytes of a chunk's turns: what Python allocates for `turns`, which has no shared memory of its own."""
    pairs = d_state // 4
    assert 4 * turns_of(64 // rank, pairs, d_state) == torch.ops.nam56r.ssd_shared("Turns", 2, rank, d_state)


def test_too_many_sequences():
    x, B = (torch.empty(70_000, 1, *shape, device="meta") for shape in ((1, 32), (1, 1, 32)))
    with pytest.raises(ValueError, match="there are 70000 sequences, but the CUDA scan takes at most 65535"):
        sizes_of(0, x, B, None, None)


def asked(operator="mamba3_scan", dtype=torch.bfloat16, device="h200", R=4, P=64, N=128, N_a=None):
    shapes = {"x": (2, 9, 16, P), "B": (2, 9, R, 8, N), "angles": (2, 9, 1, N // 4 if N_a is None else N_a)}
    if operator == "mamba2_scan":
        shapes = {"x": (2, 9, 16, P), "B": (2, 9, 8, N)}
    specs = {name: Spec(shape, dtype) for name, shape in shapes.items()}
    if operator == "mamba3_scan":
        specs["psi"] = Spec((16, R, P), torch.float32) if R > 1 else None
    return Problem.of(operator, device=DEVICES[device], **specs)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"dtype": torch.float32}, ["x is torch.float32, but the CUDA kernel takes bfloat16 or float16"]),
        ({"R": 3}, ["R = 3, but the CUDA kernel takes 1, 2, 4, 8"]),
        ({"P": 48}, ["P = 48, but the CUDA kernel takes 32, 64, 128"]),
        ({"N": 100}, ["N = 100, but the CUDA kernel takes 32, 64, 128, 256"]),
        ({"N_a": 16}, ["N_a = 16 with N = 128, but the CUDA kernel takes N_a = N / 4"]),
        ({"R": 3, "P": 8, "dtype": torch.float64}, ["x is torch.float64", "R = 3", "P = 8"]),
        ({"operator": "mamba2_scan", "P": 16, "N": 24}, ["P = 16", "N = 24"]),
        ({"device": "b200", "R": 3}, ["b200 is sm_100, but the CUDA kernel takes sm_90 (H100, H200)", "R = 3"]),
        ({"device": "cpu"}, ["a CUDA kernel, but the device is cpu"]),
    ],
    ids=str,
)
def test_refused(change, why, monkeypatch):
    """Every reason at once."""
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(code, "REGISTERED", True)
    problem = asked(**change)
    reasons = candidates(problem.operator)[0].refuses(problem)
    assert len(reasons) == len(why) and all(map(str.startswith, reasons, why))


def test_refused_without_the_extension(monkeypatch):
    refuses = candidates("mamba2_scan")[0].refuses
    monkeypatch.setattr(code, "REGISTERED", False)
    monkeypatch.setattr(extension, "load", lambda: None)
    (why,) = refuses(asked("mamba2_scan"))
    assert why == "CUDA extension built from older sources, without the Mamba scan: install the package again"
    monkeypatch.setattr(extension, "load", lambda: "not built: no nvcc")
    assert refuses(asked("mamba2_scan")) == ("CUDA extension not built: no nvcc",)


def test_refused_by_the_device(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(code, "REGISTERED", True)
    monkeypatch.setattr(code, "built", lambda *given: False)
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    monkeypatch.setattr(nvrtc, "arch_of", lambda capability: "sm_90a")
    monkeypatch.setattr(
        code, "shared_bytes", lambda kernel, shape: shape.rank * (40_000 if kernel == "gradient" else 20_000)
    )
    refuses = candidates("mamba3_scan")[0].refuses
    assert refuses(asked()) == ()
    monkeypatch.setattr(nvrtc, "missing", lambda: "CuPy is not installed: pip install nam56r[nvrtc]")
    assert refuses(asked()) == ("CuPy is not installed: pip install nam56r[nvrtc]",)
    monkeypatch.setattr(code, "built", lambda *given: True)
    assert refuses(asked()) == ()
    assert refuses(asked(R=8)) == ("R = 8, N = 128 takes more shared memory than h200 has (gradient)",)
    for device, number in (("a100", 80), ("b200", 100)):
        assert refuses(asked(device=device)) == (
            f"{device} is sm_{number}, but the CUDA kernel takes sm_90 (H100, H200)",
        )


@pytest.mark.parametrize("ahead", [True, False])
def test_the_choice_is_traced(ahead, monkeypatch):
    """In one graph: built ahead, or to be compiled."""
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(code, "REGISTERED", True)
    monkeypatch.setattr(code, "built", lambda *given: ahead)
    monkeypatch.setattr(code, "shared_bytes", lambda kernel, shape: 100_000)
    torch._dynamo.reset()
    select.cache_clear()
    problem = asked()
    chosen = torch.compile(lambda x: x + (select(problem).name == "cuda"), fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1)).item() == 1
    select.cache_clear()
