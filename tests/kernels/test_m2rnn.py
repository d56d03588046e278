"""M²RNN: the reference and its written-out backward against plain steps, the CUDA kernel against the reference."""

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nam56r.kernels import nvrtc
from nam56r.kernels.m2rnn import cuda, m2rnn, reference
from nam56r.kernels.registry import DEVICES, Device, NoKernel, Problem, Spec, candidates, select
from nam56r.kernels.testing import agree, flatten, kernels_here, outputs_and_gradients, replays, same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(
    B=2,
    S=9,
    H=6,
    Hq=1,
    Hk=1,
    K=5,
    V=3,
    *,
    state=None,
    ends=None,
    dtype=torch.float64,
    parameters=None,
    device="cpu",
    seed=0,
):
    """state: rows of the initial state; ends: the packed sequences' bounds; parameters: dtype of W, f and the state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "q": draw(B, S, Hq, K),
        "k": draw(B, S, Hk, K),
        "v": draw(B, S, H, V),
        "weight": 0.8 * torch.eye(V, dtype=torch.float64)
        + 0.2 * draw(H, V, V) / V**0.5,  # a chaotic scan judges nothing
        "forget": torch.sigmoid(2 * draw(B, S, H)),
    }
    if state is not None:
        made["initial_state"] = draw(state, H, K, V)
    dtypes = dict.fromkeys(("q", "k", "v"), dtype)
    made = {name: t.to(dtypes.get(name, parameters or dtype)).to(device).requires_grad_() for name, t in made.items()}
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return made


def steps(q, k, v, weight, forget, initial_state=None, cu_seqlens=None):
    """The equations, one step after the other, nothing else."""
    B, S, H, V = v.shape
    q, k = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (q, k))
    rows = [(b, 0, S) for b in range(B)]
    if cu_seqlens is not None:
        rows = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    outputs, finals = [], []
    for n, (b, start, end) in enumerate(rows):
        h = torch.zeros(H, q.shape[-1], V, dtype=v.dtype) if initial_state is None else initial_state[n]
        for t in range(start, end):
            z = torch.tanh(torch.einsum("hkv,hvw->hkw", h, weight) + torch.einsum("hk,hv->hkv", k[b, t], v[b, t]))
            f = forget[b, t, :, None, None]
            h = f * h + (1 - f) * z
            outputs.append(torch.einsum("hk,hkv->hv", q[b, t], h))
        finals.append(h)
    return torch.stack(outputs).view(v.shape), torch.stack(finals)


def assert_equal(run, definition, made, tolerance=1e-10):
    got, got_gradients = outputs_and_gradients(run, made, torch.float64)
    want, want_gradients = outputs_and_gradients(definition, made, torch.float64)
    for mine, exact in zip([*got, *got_gradients.values()], [*want, *want_gradients.values()], strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("Hq, Hk, state", [(1, 1, None), (2, 3, 2), (6, 6, 2)])
def test_equals_its_steps(S, Hq, Hk, state):
    assert_equal(m2rnn, steps, inputs(S=S, Hq=Hq, Hk=Hk, state=state))


@pytest.mark.parametrize("state", [None, 4])
def test_packed(state):
    made = inputs(B=1, S=80, H=2, state=state, ends=[0, 3, 3, 79, 80])
    assert_equal(m2rnn, steps, made)


def test_packed_equals_separate_bit_for_bit():
    made = inputs(B=1, S=80, H=2, state=3, ends=[0, 70, 70, 80], dtype=torch.float32)
    y, final = m2rnn(**made)
    along = ("q", "k", "v", "forget")
    for n, (start, end) in enumerate(pairwise([0, 70, 70, 80])):
        part = {name: made[name][:, start:end] for name in along}
        y_n, final_n = m2rnn(**part, weight=made["weight"], initial_state=made["initial_state"][n : n + 1])
        assert torch.equal(y_n, y[:, start:end])
        assert torch.equal(final_n, final[n : n + 1])


def test_a_run_in_two_parts_equals_one():
    def halves(q, k, v, weight, forget, initial_state):
        first = m2rnn(q[:, :50], k[:, :50], v[:, :50], weight, forget[:, :50], initial_state)
        second = m2rnn(q[:, 50:], k[:, 50:], v[:, 50:], weight, forget[:, 50:], first[1])
        return torch.cat((first[0], second[0]), dim=1), second[1]

    assert_equal(halves, m2rnn, inputs(S=90, state=2))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)
    made = inputs(B=1, S=7, H=2, K=2, V=2, state=2, ends=[0, 5, 7]) if packed else inputs(S=7, H=2, K=2, V=2, state=2)
    names = [name for name in made if name != "cu_seqlens"]
    fixed = {"cu_seqlens": made.get("cu_seqlens")}
    assert torch.autograd.gradcheck(lambda *t: m2rnn(**dict(zip(names, t)), **fixed), [made[n] for n in names])


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    made = inputs(S=100, H=3, K=8, V=8, state=2, dtype=dtype)
    agree(m2rnn, reference.m2rnn, made, same_dtype=partial(reference.m2rnn, compute_dtype=dtype))
    y, final = m2rnn(**made)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)


def test_the_state_is_kept_in_fp32():
    """f = 0.999 for 2000 steps: a bf16 state would stop moving long before its limit."""
    made = inputs(B=1, S=2000, H=1, K=2, V=2, dtype=torch.bfloat16)
    made = {name: t.detach() for name, t in made.items()} | {"forget": torch.full((1, 2000, 1), 0.999)}
    exact, _ = reference.m2rnn(**{name: t.double() for name, t in made.items()})
    rounded, _ = reference.m2rnn(**made, compute_dtype=torch.bfloat16)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_not_contiguous():
    made = inputs(S=66, Hq=2, state=2, dtype=torch.float32)
    strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in made.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    for mine, same in zip(m2rnn(**strided), m2rnn(**made)):
        assert torch.equal(mine, same)


def test_same_bits():
    same_bits(m2rnn, inputs(S=70, state=2, dtype=torch.float32))


@pytest.mark.parametrize("B, S", [(2, 0), (0, 5)])
def test_empty(B, S):
    made = inputs(B=B, S=S, state=B)
    y, final = m2rnn(**made)
    assert y.shape == (B, S, 6, 3)
    assert torch.equal(final, made["initial_state"])
    assert m2rnn(**inputs(B=1, S=0, ends=[0]))[1].shape == (0, 6, 5, 3)


NO_HEADS = {"v": (2, 9, 0, 3), "weight": (0, 3, 3), "forget": (2, 9, 0)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.zeros(2, 8, 1, 5)}, ValueError, r"m2rnn: k is \[2, 8, 1, 5\], but must be \[B=2, S=9, Hk, K=5\]"),
        ({"k": torch.zeros(2, 9, 4, 5)}, ValueError, "Hk = 4 must divide H = 6"),
        ({"v": torch.zeros(2, 9, 6, 3).double()}, TypeError, "v is float64, but must be float32"),
        ({"weight": torch.zeros(6, 3, 4)}, ValueError, "weight is"),
        ({"forget": None}, TypeError, "forget is NoneType"),
        ({"initial_state": torch.zeros(1, 6, 5, 3)}, ValueError, r"initial_state is \[1, 6, 5, 3\], but must be \[2,"),
        ({name: torch.zeros(shape) for name, shape in NO_HEADS.items()}, ValueError, "Hq = 1 must divide H = 0"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, "B must be 1, not 2"),
        ({"kernel": "fast"}, ValueError, "no kernel 'fast': one of cuda, reference"),
        ({"kernel": "cuda"}, NoKernel, "a CUDA kernel, but the device is cpu"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        m2rnn(**{**inputs(dtype=torch.float32), **change})


def test_no_sequence_for_rows():
    made = inputs(B=1, S=9, dtype=torch.float32) | {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(ValueError, match="cu_seqlens"):
        m2rnn(**made)


def problem(K, V, dtype, device):
    specs = {"q": (2, 9, 1, K), "k": (2, 9, 1, K), "v": (2, 9, 6, V), "weight": (6, V, V), "forget": (2, 9, 6)}
    return Problem.of("m2rnn", device=device, **{name: Spec(shape, dtype) for name, shape in specs.items()})


def refusals(*shape):
    return candidates("m2rnn")[0].refuses(problem(*shape))


built = pytest.mark.skipif(not cuda.REGISTERED, reason="the extension isn't built")


def test_refused_on_a_gpu_unless_named():
    asked = problem(5, 24, torch.float64, DEVICES["h200"])
    assert select(asked, "reference").role == "development"
    with pytest.raises(NoKernel, match="only when asked for by name"):
        select(asked)


@built
@pytest.mark.parametrize("name", ["h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recipes_shape_is_built_ahead(dtype, name, monkeypatch):
    monkeypatch.setattr(nvrtc, "missing", lambda: "no compiler")
    asked = problem(64, 16, dtype, DEVICES[name])
    assert refusals(64, 16, dtype, DEVICES[name]) == ()
    assert select.__wrapped__(asked).name == "cuda"


@built
@pytest.mark.parametrize(
    "K, V, dtype, why",
    [
        (64, 24, torch.bfloat16, ["V = 24, but the CUDA kernel takes 16, 32, 64"]),
        (129, 16, torch.bfloat16, ["K = 129, but the CUDA kernel takes 1 to 128"]),
        (0, 16, torch.bfloat16, ["K = 0, but the CUDA kernel takes 1 to 128"]),
        (64, 16, torch.float64, ["q is torch.float64, but the CUDA kernel takes bfloat16, float16 or float32"]),
        (129, 24, torch.float64, ["q is torch.float64", "K = 129", "V = 24"]),
    ],
)
def test_refused(K, V, dtype, why):
    """Every reason at once."""
    reasons = refusals(K, V, dtype, DEVICES["h200"])
    assert len(reasons) == len(why) and all(map(str.startswith, reasons, why))
    assert refusals(K, V, dtype, DEVICES["cpu"]) == ("a CUDA kernel, but the device is cpu",)


@built
def test_what_is_not_built_ahead_needs_the_compiler(monkeypatch):
    asked = [
        (64, 16, torch.bfloat16, DEVICES["a100"]),
        (64, 16, torch.bfloat16, DEVICES["b200"]),
        (48, 16, torch.bfloat16, DEVICES["h200"]),
        (64, 32, torch.float16, DEVICES["h200"]),
    ]
    assert not any(refusals(*shape) for shape in asked)
    remedy = "CuPy is not installed: pip install nam56r[nvrtc]"
    monkeypatch.setattr(nvrtc, "missing", lambda: remedy)
    assert [refusals(*shape) for shape in asked] == [(remedy,)] * 4


@built
def test_too_large_for_shared_memory():
    (why,) = refusals(128, 64, torch.float32, DEVICES["a100"])
    assert why == "K = 128, V = 64 in torch.float32 takes more shared memory than a100 has"
    assert refusals(128, 64, torch.float32, DEVICES["h200"]) == ()


@built
def test_a_device_without_the_instructions_is_refused():
    """bf16 and tf32 products came with compute capability 8.0."""
    for dtype in DTYPES:
        assert refusals(64, 16, dtype, Device("t4", "cuda", (7, 5))) == ("t4 is sm_75, but it takes sm_80 or later",)


@built
@pytest.mark.parametrize("V", [16, 32])
def test_the_choice_is_traced(V):
    """In one graph, in a process that hasn't chosen a kernel before: built ahead (V = 16) or to be compiled."""
    asked = problem(64, V, torch.bfloat16, DEVICES["h200"])
    torch._dynamo.reset()
    re.purge()
    chosen = torch.compile(lambda x: x + (select(asked).name == "cuda"), fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1)).item() == 1


CAPABILITIES = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}
SHAPES = st.tuples(st.integers(1, 128), st.sampled_from(cuda.COLUMNS), st.sampled_from(DTYPES))


@given(SHAPES, st.sampled_from(list(CAPABILITIES)), st.integers(1, 128))
def test_chunks(shape, capability, more):
    """The longest power of two whose states fit; never longer for a larger state or a smaller device."""
    keys, columns, dtype = shape
    chunk = cuda.chunk_of(*shape, capability)
    assert chunk in (0, 1, 2, 4, 8, 16)
    room = (32 if CAPABILITIES[capability] == 227 else 16) * 1024
    state = len(range(0, keys, 16)) * 16 * columns * (2 if dtype == torch.bfloat16 else 4)
    assert chunk * state <= room
    assert chunk == 16 or max(2 * chunk, 1) * state > room
    assert cuda.chunk_of(min(keys + more, 128), columns, dtype, capability) <= chunk
    assert cuda.chunk_of(keys, min(2 * columns, 64), dtype, capability) <= chunk
    assert chunk <= cuda.chunk_of(keys, columns, dtype, (9, 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_shared_memory_fits_the_device(capability):
    """What a block of every shape asks for, said by the compiler, is at most what the device gives."""
    asserted = [
        f"static_assert(sizeof(nam56r::m2rnn::{kernel}Shared<{name}, {V}, {blocks}, {chunk}>) <= "
        f'{CAPABILITIES[capability] * 1024}, "{kernel} {name} V={V} K={16 * blocks}");'
        for dtype, name in cuda.NAMES.items()
        for V in cuda.COLUMNS
        for blocks in range(1, 9)
        if (chunk := cuda.chunk_of(16 * blocks, V, dtype, capability))
        for kernel in ("Forward", "Gradient", "Products")
    ]
    text = "\n".join([nvrtc.source("m2rnn", "kernels.cuh"), *asserted, "__global__ void nothing() {}"])
    options = (*nvrtc.OPTIONS, f"-arch={nvrtc.arch_of(capability)}")
    names, _ = nvrtc._compile(text, "m2rnn/kernels.cuh", options, ["nothing"])
    assert names.keys() == {"nothing"}


@pytest.mark.parametrize(
    "K, V, dtype, capability",
    [
        (16, 16, torch.bfloat16, (8, 0)),
        (40, 32, torch.float16, (12, 0)),
        (128, 64, torch.float32, (9, 0)),
    ],
)
def test_compiles_at_run_time(K, V, dtype, capability, monkeypatch, tmp_path):
    """What is handed to the loader: a CUBIN with the four kernels, for a shape that isn't built ahead."""
    given_over = []
    monkeypatch.setattr(nvrtc, "folder", lambda: tmp_path)
    monkeypatch.setattr(cuda, "built", lambda *shape: False)
    monkeypatch.setattr(torch.ops.nam56r, "m2rnn_load", lambda *arguments: given_over.append(arguments), raising=False)
    cuda._load.cache_clear()
    chunk = cuda.prepare(K, V, dtype, capability)
    cuda._load.cache_clear()  # nothing was loaded
    assert chunk == cuda.chunk_of(K, V, dtype, capability)
    ((cubin, names, *numbers),) = given_over
    assert numbers == [cuda.ELEMENTS[dtype], V, -(-K // 16), chunk, 10 * capability[0] + capability[1]]
    content = cubin.numpy().tobytes()
    assert content.startswith(b"\x7fELF") and len(set(names)) == 4
    for name, kernel in zip(names, ("forward", "gradient", "products", "reduce")):
        assert kernel in name and f".text.{name}\0".encode() in content
    (unit,) = nvrtc.cached()
    assert unit.family == "m2rnn" and list(unit.names.values()) == names


@built
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("ends", [None, [0, 0, 7, 33, 33]])
@pytest.mark.parametrize("chunk", [1, 8, 16])
def test_traced_shapes(chunk, ends, state):
    """What the compiled operators tell torch.compile, without a GPU: shapes and dtypes of results and gradients."""
    rows = len(ends) - 1 if ends else 2
    made = inputs(
        B=1 if ends else 2,
        S=33,
        Hq=2,
        Hk=3,
        K=40,
        V=32,
        state=rows if state else None,
        ends=ends,
        dtype=torch.bfloat16,
        parameters=torch.float32,
    )
    made = {name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in made.items()}
    initial_state, cu_seqlens = made.get("initial_state"), made.get("cu_seqlens")
    tensors = [made[name] for name in ("q", "k", "v", "weight", "forget")]
    for save in (True, False):
        y, final_state, states = torch.ops.nam56r.m2rnn_forward(*tensors, initial_state, cu_seqlens, chunk, save)
        chunks = 33 // chunk + rows if ends else 2 * len(range(0, 33, chunk))
        assert (y.shape, y.dtype) == (made["v"].shape, torch.bfloat16)
        assert (final_state.shape, final_state.dtype) == ((rows, 6, 40, 32), torch.float32)
        assert (states.shape, states.dtype) == ((chunks if save else 0, 6, 48 * 32), torch.float32)
        assert y.requires_grad and final_state.requires_grad and not states.requires_grad
    with pytest.raises(RuntimeError, match="the forward ran without saving states"):
        y.sum().backward()
    y, final_state, _ = torch.ops.nam56r.m2rnn_forward(*tensors, initial_state, cu_seqlens, chunk, True)
    (y.sum() + final_state.sum()).backward()
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in made.values() if t.requires_grad)


# From here on a GPU.

gpu = pytest.mark.gpu
on_gpu = partial(inputs, device="cuda")
run = partial(m2rnn, kernel="cuda")
ALONG = ("q", "k", "v", "forget")
# (K, V, Hq, Hk, rows of the initial state): every K and V, row blocks of 1 to 8, chunks of 16 steps to one
HEADS = [
    (1, 16, 1, 1, None),
    (5, 32, 2, 3, 2),
    (16, 64, 6, 6, 2),
    (40, 16, 1, 1, 2),
    (40, 32, 2, 3, None),
    (64, 16, 1, 1, None),
    (64, 16, 6, 2, 2),
    (64, 32, 6, 1, None),
    (100, 64, 3, 2, 2),
    (128, 16, 2, 6, None),
    (128, 64, 1, 1, 2),
]
# a sequence is walked in chunks of up to 16 steps, and back in units of two chunks
LENGTHS = [[1, 2], [7, 8, 9], [15, 16, 17], [31, 32, 33], [63, 64, 65], [257]]
PACKED = {
    "empty ones": [0, 0, 0, 7, 7, 40, 57, 57, 57],
    "single steps": [0, 1, 2, 3, 4, 36, 37],
    "one": [0, 33],
    "whole chunks": [0, 16, 48, 112],
    "many": [0, *range(5, 60, 3), 90],
}


def judge(draws, pick=lambda results: results, factor=2.0):
    """The draws, taken as one, against the definition."""
    dtype = draws[0]["q"].dtype
    definitions = [reference.m2rnn, partial(reference.m2rnn, compute_dtype=dtype), run]
    exact, plain, ours = (lambda f=f, **made: pick(f(**made)) for f in definitions)
    return agree(ours, exact, draws, same_dtype=plain, factor=factor)


def leaves_of(made):
    return [t for t in made.values() if t.requires_grad]


def assert_same(got, want):
    """Bit for bit, nested or not."""
    for mine, theirs in zip(flatten(got), flatten(want), strict=True):
        assert torch.equal(mine, theirs)


def everything(made):
    """Results and gradients of the CUDA kernel."""
    outputs, gradients = outputs_and_gradients(run, made, None)
    return [*outputs, *gradients.values()]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", kernels_here("m2rnn"))
def test_on_a_gpu(kernel, dtype):
    for made in (
        inputs(S=257, H=51, K=64, V=16, state=2, dtype=dtype, device="cuda"),
        inputs(B=1, S=100, K=64, V=16, state=3, ends=[0, 1, 1, 100], dtype=dtype, device="cuda"),
    ):
        same_dtype = partial(reference.m2rnn, compute_dtype=dtype)
        agree(partial(m2rnn, kernel=kernel), reference.m2rnn, made, same_dtype=same_dtype)
        assert all(t.is_cuda for t in flatten(m2rnn(**made, kernel=kernel)))


@gpu
@pytest.mark.parametrize("K, V, Hq, Hk, state", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_agrees(dtype, K, V, Hq, Hk, state, poisoned):
    make = partial(on_gpu, Hq=Hq, Hk=Hk, K=K, V=V, state=state, dtype=dtype)
    for lengths in LENGTHS:
        seeds = -(-128 // (2 * sum(lengths) * K * min(Hq, Hk)))  # a few elements say little of rounding
        judge([make(S=S, seed=seed) for S in lengths for seed in range(seeds)])


@gpu
@pytest.mark.parametrize("ends", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_packed(dtype, ends, poisoned):
    for state in (None, len(ends) - 1):
        for K, V in ((64, 16), (128, 64)):
            judge([on_gpu(B=1, S=ends[-1], Hq=2, K=K, V=V, state=state, ends=ends, dtype=dtype)])


@gpu
@pytest.mark.parametrize("ends", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("state", [True, False])
def test_gpu_packed_equals_separate(ends, state):
    """A sequence doesn't notice its neighbours: the same bits of every result and gradient that is its own."""
    rows = len(ends) - 1
    made = on_gpu(B=1, S=ends[-1], K=64, V=16, state=rows if state else None, ends=ends, dtype=torch.bfloat16)
    own = [name for name in ("v", "forget", "initial_state") if name in made]
    y, final = run(**made)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    gradients = dict(zip(own, torch.autograd.grad((y, final), [made[name] for name in own], (dy, dfinal))))
    for n, (start, end) in enumerate(pairwise(ends)):
        part = {name: made[name][:, start:end].detach().requires_grad_() for name in ALONG}
        part["weight"] = made["weight"]
        if state:
            part["initial_state"] = made["initial_state"][n : n + 1].detach().requires_grad_()
        y_n, final_n = run(**part)
        assert_same((y_n, final_n), (y[:, start:end], final[n : n + 1]))
        weights = dy[:, start:end], dfinal[n : n + 1]
        for name, gradient in zip(own, torch.autograd.grad((y_n, final_n), [part[name] for name in own], weights)):
            whole = gradients[name]
            assert_same(gradient, whole[n : n + 1] if name == "initial_state" else whole[:, start:end])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_nothing_flows_between_sequences_or_back_in_time(dtype):
    """NaN in one sequence stays there; other values at a step, inf too, leave every step before it as it was."""
    ends = [0, 5, 21, 60]
    made = on_gpu(B=1, S=60, K=64, V=16, ends=ends, dtype=dtype)
    made = {name: t.detach() for name, t in made.items()}
    y, final = run(**made)
    changed = {name: t.clone() for name, t in made.items()}
    for name in ALONG:
        changed[name][:, 5:21] = float("nan")
    y_nan, final_nan = run(**changed)
    assert_same((y_nan[:, :5], y_nan[:, 21:]), (y[:, :5], y[:, 21:]))
    assert_same((final_nan[0], final_nan[2]), (final[0], final[2]))
    assert y_nan[:, 5:21].isnan().all() and final_nan[1].isnan().all()
    for at in (1, 4, 22, 37, 59):
        later = made | {name: torch.cat((made[name][:, :at], made[name][:, at:].flip(2)), 1) for name in ALONG}
        assert_same(run(**later)[0][:, :at], y[:, :at])
        for name in ("k", "v"):
            endless = made | {name: made[name].index_fill(1, torch.tensor([at], device="cuda"), float("inf"))}
            assert_same(run(**endless)[0][:, :at], y[:, :at])


@gpu
@pytest.mark.parametrize("used", ["y", "final_state"])
@pytest.mark.parametrize("state", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_one_result_used(dtype, state, used, poisoned):
    """The other's gradient is then None."""
    pick = ("y", "final_state").index(used)
    judge([on_gpu(S=35, K=64, V=16, state=state, dtype=dtype)], lambda results: results[pick])


@gpu
@pytest.mark.parametrize("wanted", ["q", "k", "v", "weight", "forget", "initial_state"])
def test_gpu_one_gradient_wanted(wanted, poisoned):
    made = on_gpu(S=35, K=64, V=16, state=2, dtype=torch.bfloat16)
    _, gradients = outputs_and_gradients(run, made, None)
    (all_of,) = (gradient for name, gradient in gradients.items() if name.split(":")[1] == wanted)
    alone = {name: t.detach().requires_grad_(name == wanted) for name, t in made.items()}
    _, gradients = outputs_and_gradients(run, alone, None)
    assert_same(list(gradients.values()), [all_of])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_without_gradients(dtype, poisoned):
    """The same bits, though no state is saved."""
    made = on_gpu(S=65, K=64, V=16, state=2, dtype=dtype)
    with torch.no_grad():
        quiet = run(**made)
    assert not any(t.requires_grad for t in quiet)
    assert_same(quiet, run(**made))
    assert_same(quiet, run(**{name: t.detach() for name, t in made.items()}))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_saved_states_are_needed(dtype):
    made = on_gpu(S=9, K=64, V=16, dtype=dtype, parameters=torch.float32)
    chunk = cuda.prepare(64, 16, dtype, torch.cuda.get_device_capability())
    y, _, states = torch.ops.nam56r.m2rnn_forward(*made.values(), None, None, chunk, False)
    assert states.numel() == 0 and not states.requires_grad
    with pytest.raises(RuntimeError, match=r"the forward ran without saving states \(save_states=False\)"):
        y.sum().backward()


def in_place(made, margin):
    """q, k and v side by side as in the convolution's output, [B, S, 944] for the recipe, with NaN around them."""
    parts = [made[name].detach().flatten(2) for name in ("q", "k", "v")]
    sizes = [t.shape[2] for t in parts]
    B, S = parts[0].shape[:2]
    wide = torch.full((B, S, sum(sizes) + 2 * margin), float("nan"), dtype=parts[0].dtype, device="cuda")
    wide[..., margin : margin + sum(sizes)] = torch.cat(parts, -1)
    pieces = wide.split([margin, *sizes, margin], -1)[1:-1]
    slices = {name: t.unflatten(2, made[name].shape[2:]) for name, t in zip(("q", "k", "v"), pieces)}
    return {name: slices.get(name, t).detach().requires_grad_(t.requires_grad) for name, t in made.items()}


def rows_first(made):
    """[S, B, ...] underneath, as the layer's projection gives it; f of strides (N, B N, 1)."""
    swapped = {name: made[name].detach().transpose(0, 1).contiguous().transpose(0, 1) for name in ALONG}
    return {name: swapped.get(name, t).detach().requires_grad_(t.requires_grad) for name, t in made.items()}


def every_other(made):
    """The last stride is 2, which the kernel doesn't read in place."""
    return {name: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for name, t in made.items()}


@gpu
@pytest.mark.parametrize("K, V", [(64, 16), (40, 32), (5, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_strides(dtype, K, V, poisoned):
    """Read in place, aligned to 16 bytes (margin 8) or not (1, 3), or copied first: the bits of a contiguous run."""
    made = on_gpu(S=35, H=51 if V == 16 else 6, K=K, V=V, state=2, dtype=dtype, parameters=torch.float32)
    want = everything(made)
    for change in (*(partial(in_place, margin=margin) for margin in (0, 1, 3, 8)), rows_first, every_other):
        assert_same(everything(change(made)), want)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_strides_of_gradients(dtype, poisoned):
    made = on_gpu(S=35, K=64, V=16, state=2, dtype=dtype)
    y, final = run(**made)

    def gradients(*weights):
        return torch.autograd.grad((y, final), leaves_of(made), weights, retain_graph=True)

    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    want = gradients(dy, dfinal)
    assert_same(gradients(dy.mT.contiguous().mT, dfinal.mT.contiguous().mT), want)
    assert_same(gradients(dy.transpose(0, 1).contiguous().transpose(0, 1), dfinal), want)
    wide = torch.full((*y.shape[:3], 17), float("nan"), dtype=dtype, device="cuda")
    wide[..., 1:] = dy
    assert_same(gradients(wide[..., 1:], dfinal), want)
    one_row = dy[:, :1].expand_as(dy)
    assert_same(gradients(one_row, dfinal), gradients(one_row.contiguous(), dfinal))
    summed = torch.autograd.grad(y.sum() + final.sum(), leaves_of(made), retain_graph=True)
    assert_same(summed, gradients(torch.ones_like(y), torch.ones_like(final)))


@gpu
def test_gpu_beyond_32_bit_offsets():
    """Slices whose last rows lie more than 2^31 elements after the first."""
    made = on_gpu(B=1, S=35, K=64, V=16, dtype=torch.bfloat16)
    wide = torch.empty(35, 2**26, dtype=torch.bfloat16, device="cuda")
    far, at = dict(made), 0
    for name in ("q", "k", "v"):
        shape = made[name].shape
        piece = wide[None, :, at : at + shape[2:].numel()].unflatten(2, shape[2:])
        far[name] = piece.copy_(made[name].detach()).requires_grad_()
        at += shape[2:].numel()
    assert_same(everything(far), everything(made))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_more_blocks_than_fit(dtype, poisoned):
    make = partial(on_gpu, B=4, S=64, H=44, K=64, V=16, dtype=dtype)
    judge([make(Hq=1, Hk=1)])
    judge([make(Hq=4, Hk=11, state=4)])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_mixed_dtypes(dtype, poisoned):
    """W, f and the initial state of another dtype than q's; their gradients are in theirs."""
    for parameters in (torch.bfloat16, torch.float32):
        judge([on_gpu(S=65, K=64, V=16, state=2, dtype=dtype, parameters=parameters)])


@gpu
def test_gpu_the_state_is_kept_in_fp32():
    """f = 0.999 for 2000 steps: a bf16 state would stop moving long before its limit."""
    made = on_gpu(B=1, S=2000, H=2, K=64, V=16, dtype=torch.bfloat16, parameters=torch.float32)
    made = {name: t.detach() for name, t in made.items()} | {"forget": torch.full((1, 2000, 2), 0.999, device="cuda")}
    judge([made])


@gpu
@pytest.mark.parametrize("exponent", [8, 14, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_slow_forgetting(dtype, exponent, poisoned):
    """1 - f down to 2^-20: what a step adds is small beside 1, but all that the state ever gets."""
    draws = [on_gpu(S=65, K=64, V=16, dtype=dtype, parameters=torch.float32, seed=seed) for seed in range(2)]
    for made in draws:
        rest = made["forget"].detach() * 2.0**-exponent
        made["forget"] = (1 - rest).requires_grad_()
    judge(draws)


@gpu
@pytest.mark.parametrize("exponent", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_small_signals(dtype, exponent, poisoned):
    """k vᵀ of 2^-4 and 2^-10: the tanh is almost its argument."""
    draws = [on_gpu(S=65, K=64, V=16, dtype=dtype, seed=seed) for seed in range(4)]
    for made in draws:
        made |= {name: (made[name].detach() * 2.0**-exponent).requires_grad_() for name in ("k", "v")}
    # the tensor cores cut off each tf32 product, always towards zero; where every step adds linearly that adds up: 2.03
    # times PyTorch's fp32 at 2^-5
    judge(draws, factor=2.5 if dtype == torch.float32 else 2.0)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_saturates(dtype, poisoned):
    """|k v| from 10^4 up to beyond 10^8: Z is 1 or -1, and nothing flows through the tanh."""
    made = on_gpu(S=35, K=64, V=16, state=2, dtype=dtype, parameters=torch.float32)
    for name in ("k", "v"):
        t = made[name].detach()
        made[name] = (t.sign() * (t.abs() * 1e4).clamp(1e2, 3e4)).requires_grad_()
    judge([made])
    outputs, gradients = outputs_and_gradients(run, made, None)
    assert all(t.isfinite().all() for t in (*outputs, *gradients.values()))
    for name, gradient in gradients.items():
        if name.split(":")[1] in ("k", "v", "weight"):
            assert gradient.count_nonzero() == 0


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_large_initial_state(dtype, poisoned):
    made = on_gpu(S=35, K=64, V=16, state=2, dtype=dtype, parameters=torch.float32)
    made["initial_state"] = (made["initial_state"].detach() * 1e3).requires_grad_()
    judge([made])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gates_of_0_and_1(dtype, poisoned):
    """f = 1 leaves the state as it is, f = 0 replaces it; both among others, with gradients."""
    made = on_gpu(S=67, K=64, V=16, state=2, dtype=dtype, parameters=torch.float32)
    ones = made | {"forget": torch.ones_like(made["forget"]).requires_grad_()}
    assert_same(run(**ones)[1], made["initial_state"])
    zeros = made | {"forget": torch.zeros_like(made["forget"]).requires_grad_()}
    drawn = torch.randint(0, 3, made["forget"].shape, device="cuda")
    mixed = torch.where(drawn == 0, torch.zeros_like(made["forget"]), torch.where(drawn == 1, 1.0, made["forget"]))
    for each in (ones, zeros, made | {"forget": mixed.detach().requires_grad_()}):
        judge([each])


@gpu
@pytest.mark.parametrize("ends", [None, PACKED["empty ones"]], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_repeats_and_replays(dtype, ends):
    """One graph serves every value of that shape, the bounds of its sequences too."""
    rows = len(ends) - 1 if ends else 2
    other = [0, 9, 9, 10, 30, 30, 31, 57, 57]

    def make(seed):
        bounds = (other if seed == 2 else ends) if ends else None
        S, B = (57, 1) if ends else (70, 2)
        return on_gpu(B=B, S=S, H=51, K=64, V=16, state=rows, ends=bounds, dtype=dtype, seed=seed)

    same_bits(run, make(0))
    replays(run, make)


@gpu
def test_gpu_replays_what_was_compiled_at_run_time():
    replays(run, lambda seed: on_gpu(S=35, K=40, V=32, state=2, dtype=torch.bfloat16, seed=seed))


@gpu
@pytest.mark.parametrize("state", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_opcheck(dtype, state):
    made = on_gpu(S=35, K=64, V=16, state=state, dtype=dtype, parameters=torch.float32)
    chunk = cuda.prepare(64, 16, dtype, torch.cuda.get_device_capability())
    tensors = [made[name] for name in ("q", "k", "v", "weight", "forget")]
    arguments = (*tensors, made.get("initial_state"), None, chunk, True)
    torch.library.opcheck(torch.ops.nam56r.m2rnn_forward.default, arguments)
    y, final, states = (t.detach() for t in torch.ops.nam56r.m2rnn_forward(*arguments))
    tensors = [t.detach() for t in tensors]
    for weights in ((torch.randn_like(y), torch.randn_like(final)), (None, torch.randn_like(final)), (y, None)):
        torch.library.opcheck(torch.ops.nam56r.m2rnn_backward.default, (*weights, *tensors, states, None, chunk))


@gpu
def test_gpu_opcheck_packed(poisoned):
    """Of packed sequences some chunks' numbers stay unused: what is told of the operators, without their values."""
    ends = PACKED["empty ones"]
    made = on_gpu(B=1, S=ends[-1], K=64, V=16, ends=ends, dtype=torch.bfloat16, parameters=torch.float32)
    *tensors, cu_seqlens = made.values()
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    chunk = cuda.prepare(64, 16, torch.bfloat16, torch.cuda.get_device_capability())
    arguments = (*tensors, None, cu_seqlens, chunk, True)
    torch.library.opcheck(torch.ops.nam56r.m2rnn_forward.default, arguments, test_utils=utilities)
    y, final, states = (t.detach() for t in torch.ops.nam56r.m2rnn_forward(*arguments))
    arguments = (y, final, *(t.detach() for t in tensors), states, cu_seqlens, chunk)
    torch.library.opcheck(torch.ops.nam56r.m2rnn_backward.default, arguments)


@gpu
@pytest.mark.parametrize("V", [16, 32], ids=["built", "compiled"])
def test_gpu_compiles(V):
    """In one graph, whether the kernel was built ahead or is compiled when it is first asked for."""
    made = on_gpu(S=35, K=64, V=V, state=2, dtype=torch.bfloat16, parameters=torch.float32)

    def layer(q, **others):
        y, final = run(q * 2, **others)
        return y + 1, final

    torch._dynamo.reset()
    eager = layer(**made)
    compiled = torch.compile(layer, fullgraph=True)(**made)
    assert_same(compiled, eager)
    weights = [torch.randn_like(t) for t in eager]
    assert_same(*(torch.autograd.grad(results, leaves_of(made), weights) for results in (compiled, eager)))


@gpu
def test_gpu_no_second_derivative():
    made = on_gpu(B=1, S=5, K=64, V=16, dtype=torch.float32)
    (dq,) = torch.autograd.grad(run(**made)[0].square().sum(), made["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        dq.sum().backward()


@gpu
@pytest.mark.parametrize(
    "sizes, ends",
    [({"B": 0, "S": 5}, None), ({"S": 0}, None), ({"B": 1, "S": 0}, [0]), ({"B": 1, "S": 0}, [0, 0, 0])],
    ids=["no rows", "no steps", "no sequences", "empty sequences"],
)
def test_gpu_nothing_to_do(sizes, ends, poisoned):
    rows = len(ends) - 1 if ends else sizes.get("B", 2)
    made = on_gpu(**sizes, K=64, V=16, state=rows, ends=ends, dtype=torch.bfloat16, parameters=torch.float32)
    y, final = run(**made)
    assert y.shape == made["v"].shape and final.shape == (rows, 6, 64, 16)
    assert_same(final, made["initial_state"])
    gradients = dict(zip(made, torch.autograd.grad(y.sum() + 2 * final.sum(), leaves_of(made))))
    assert all(gradient.shape == made[name].shape for name, gradient in gradients.items())
    assert_same(gradients["weight"], torch.zeros_like(made["weight"]))
    assert_same(gradients["initial_state"], torch.full_like(final, 2.0))
