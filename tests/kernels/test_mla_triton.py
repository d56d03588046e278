"""Triton's latent and expanded attention beside the definition, interpreted and on a GPU."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nam56r.kernels.mla import latent_attention, mla_attention, reference
from nam56r.kernels.mla import triton as kernels
from nam56r.kernels.registry import DEVICES, Device, Problem, Spec, select
from nam56r.kernels.testing import agree, compiles, outputs_and_gradients, replays, same_bits

gpu = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PACKED = [0, 5, 5, 6, 24, 27, 27]
OPTIONS = {"causal": True, "cu_seqlens": None, "query_offset": 0, "return_lse": False}


def draw(shapes, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def latent(B, S, T, H, L, Dr, *more, **change):
    return draw(dict(q=(B, S, H, L + Dr), kv=(B, T, L + Dr)), *more, **change)


def expanded(B, S, T, H, Dn, Dr, Dv, *more, **change):
    shapes = dict(q=(B, S, H, Dn + Dr), k_nope=(B, T, H, Dn), k_rope=(B, T, Dr), v=(B, T, H, Dv))
    return draw(shapes, *more, **change)


def runs(x, **options):
    """Triton, the definition, and the definition in the inputs' dtype throughout."""
    name = "latent_attention" if "kv" in x else "mla_attention"
    operator, definition = (
        {"latent_attention": latent_attention, "mla_attention": mla_attention}[name],
        vars(reference)[name],
    )
    options = dict(scale=x["q"].shape[-1] ** -0.5) | options
    if "kv" in x:
        options = dict(value_dim=x["kv"].shape[-1] - 16) | options  # a rope of 16, where nothing else is said
    return (
        partial(operator, kernel="triton", **options),
        partial(definition, **options),
        partial(definition, compute_dtype=x["q"].dtype, **options),
    )


def judge(x, **options):
    """Beside the definition, with what that loses in the inputs' dtype as measure."""
    run, definition, coarse = runs(x, **options)
    # fp32: dS is a difference of sums that are taken in two orders, dout vᵀ and delta; the definition has one
    agree(run, definition, x, same_dtype=coarse, factor=3 if x["q"].dtype == torch.float32 else 2)


def value(x, shape):
    return {"value_dim": shape[4]} if "kv" in x else {}


def packing(ends, device="cpu"):
    return torch.tensor(ends, dtype=torch.int32, device=device)


# B, S, T, H, and the nope (or latent), rope and value dim; tiles of rows and blocks of keys are 16
LATENT = [
    (1, 17, 17, 3, 16, 16),
    (2, 2, 2, 20, 32, 16),
    (1, 20, 20, 1, 48, 0),
    (1, 7, 7, 2, 144, 16),
]
EXPANDED = [
    (1, 17, 17, 3, 32, 16, 48), (2, 2, 2, 3, 16, 16, 16), (1, 20, 20, 1, 16, 0, 32),
    (1, 18, 18, 1, 144, 16, 16), (1, 18, 18, 1, 16, 16, 160),
]  # fmt: skip


@pytest.mark.parametrize(
    "shape, causal",
    [*((shape, True) for shape in (*LATENT, *EXPANDED)), (LATENT[0], False), (EXPANDED[0], False)],
    ids=str,
)
def test_agrees(interpreter, shape, causal):
    x = (latent if len(shape) == 6 else expanded)(*shape)
    judge(x, **value(x, shape), causal=causal, return_lse=True)


@pytest.mark.parametrize("causal", [True, False])
def test_agrees_packed(interpreter, causal):
    for x in (latent(1, 27, 27, 2, 16, 16), expanded(1, 27, 27, 1, 16, 16, 16)):
        judge(x, causal=causal, cu_seqlens=packing(PACKED), return_lse=True)


def test_bounds():
    """Of a last sequence that ends too early or too late, which CUDA's inputs may: nothing outside of memory."""
    assert kernels._bounds(packing(PACKED), 27).tolist() == [
        [0] * 5 + [5] + [6] * 18 + [24] * 3,
        [5] * 5 + [6] + [24] * 18 + [27] * 3,
    ]
    assert kernels._bounds(packing([0, 2]), 4).tolist() == [[0] * 4, [2] * 4]
    assert kernels._bounds(packing([1, 9]), 3).tolist() == [[1] * 3, [3] * 3]
    assert kernels._bounds(packing([0]), 0).shape == (2, 0)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ends=st.lists(st.integers(0, 20), max_size=4),
    length=st.integers(1, 20),
    causal=st.booleans(),
    absorbed=st.booleans(),
)
def test_any_packing(interpreter, ends, length, causal, absorbed):
    """Sequences together give what they give apart, by the definition."""
    ends = [0, *sorted(min(end, length) for end in ends), length]
    x = latent(1, length, length, 2, 16, 16) if absorbed else expanded(1, length, length, 2, 16, 16, 16)
    run, definition, _ = runs(x, causal=causal, return_lse=True)

    def apart(**x):
        pieces = [{name: t[:, a:b] for name, t in x.items()} for a, b in zip(ends, ends[1:]) if a < b]
        return tuple(torch.cat(parts, 1) for parts in zip(*(definition(**piece) for piece in pieces)))

    together = outputs_and_gradients(lambda **x: run(**x, cu_seqlens=packing(ends)), x, None)
    torch.testing.assert_close(together, outputs_and_gradients(apart, x, None))


@pytest.mark.parametrize("causal", [True, False])
def test_one_token(interpreter, causal):
    """What cancels to nothing here, dq and dk without lse's gradient, is only a rounding."""
    for x in (latent(1, 1, 1, 2, 16, 16), expanded(1, 1, 1, 2, 16, 16, 16)):
        run, definition, _ = runs(x, causal=causal, return_lse=True)
        torch.testing.assert_close(outputs_and_gradients(run, x, None), outputs_and_gradients(definition, x, None))


@pytest.mark.parametrize(
    "S, T, offset, causal",
    [(5, 40, 35, True), (9, 36, 7, True), (18, 18, -9, True), (5, 9, 40, True), (5, 5, -5, True), (9, 36, 7, False)],
)
def test_agrees_with_other_keys(interpreter, S, T, offset, causal):
    """Context parallel: other keys than queries, some seen by none, some queries that see none."""
    for x in (latent(1, S, T, 2, 16, 16), expanded(1, S, T, 2, 16, 16, 16)):
        run, definition, _ = runs(x, causal=causal, query_offset=offset, return_lse=True)
        first = min(S, max(0, -offset)) if causal else 0
        out, lse = run(**x)
        assert not out[:, :first].any() and (lse[:, :first] == -torch.inf).all()
        if first < S:  # a gradient through -inf would be NaN
            agree(*(lambda f=f, **x: tuple(t[:, first:] for t in f(**x)) for f in (run, definition)), x, factor=3)


def test_a_query_that_sees_nothing_gives_no_gradient(interpreter):
    for x in (latent(1, 9, 5, 2, 16, 16), expanded(1, 9, 5, 2, 16, 16, 16)):
        run, _, _ = runs(x, query_offset=-4, return_lse=True)
        _, gradients = outputs_and_gradients(run, x, None)  # lse's are not zero, as a loss may leave them
        assert all(torch.isfinite(t).all() for t in gradients.values())
        assert not gradients["0:q"][:, :4].any()


def test_only_lse(interpreter):
    """The gradient through lse alone, and through out alone, as parts of both."""
    for x in (latent(1, 9, 9, 2, 16, 16), expanded(1, 9, 9, 2, 16, 16, 16)):
        run, definition, _ = runs(x, return_lse=True)
        for one in (0, 1):
            agree(*(lambda f=f, **x: f(**x)[one] for f in (run, definition)), x, factor=3)


@pytest.mark.parametrize("processors, absorbed, own", [(1, 2, (2, 2)), (40, 3, (4, 1))])
def test_parts_agree(interpreter, monkeypatch, processors, absorbed, own):
    """However many parts the gradient of what heads share is made in, and heads a program takes."""
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    monkeypatch.setattr(kernels, "LEAST", 1)
    x, y = latent(1, 17, 17, 2, 16, 16), expanded(1, 17, 17, 4, 16, 16, 16)
    calls = [(x["q"], x["kv"], None, None, None, 16, True, 0), (*y.values(), None, 16, True, 0)]
    assert [kernels._Call(*call).parts() for call in calls] == [(absorbed, 1), own]
    judge(x, cu_seqlens=packing([0, 5, 17]))
    judge(y, causal=False)


def test_parts_are_of_shapes(monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)

    def parts(H, S, absorbed):
        q, k, rope = (torch.empty(shape, device="meta") for shape in ((1, S, H, 128), (1, S, H, 64), (1, S, 64)))
        inputs = (q, q[:, :, 0], None, None) if absorbed else (q, k, rope, k)
        return kernels._Call(*inputs, None, 64, True, 0).parts()

    assert parts(32, 65536, True) == (1, 1)
    assert parts(1, 32, True) == (1, 1)
    several, _ = parts(32, 1024, True)
    assert 1 < several <= 1024 * 32 // 16 // kernels.LEAST
    for heads in (1, 7, 32, 51, 128):
        groups, each = parts(heads, 1024, False)
        assert groups * each == heads
    assert parts(32, 2**20, False) == (1, 32)


def test_small_and_large_scores(interpreter):
    x = latent(1, 20, 20, 2, 16, 16)
    judge(x, scale=1e-3)
    x = {name: (t.detach() * 30).requires_grad_() for name, t in x.items()}
    judge(x, return_lse=True)


def test_one_key_has_nearly_all_the_weight(interpreter):
    """dP and the sum of P dP are then nearly equal: with out's rounding in the sum the error is over 1.4 times PyTorch's."""
    half = torch.float16  # the interpreter doesn't know bfloat16
    for make in (partial(latent, 2, 3, 3, 3, 16, 16, half), partial(expanded, 2, 3, 3, 3, 16, 16, 16, half)):
        draws = [make(seed=seed) for seed in range(4)]
        run, definition, coarse = runs(draws[0], scale=0.5)
        agree(run, definition, draws, same_dtype=coarse, factor=1.2)


def turned_with_gaps(t):
    return t.transpose(0, 1).repeat_interleave(2, -1).transpose(0, 1)[..., ::2]


def test_any_strides(interpreter):
    for x in (latent(2, 5, 5, 2, 16, 16), expanded(2, 5, 5, 2, 16, 16, 16)):
        run, _, _ = runs(x, return_lse=True)
        expected = outputs_and_gradients(run, x, None)
        same = {n: turned_with_gaps(t.detach()).requires_grad_() for n, t in x.items()}
        assert not any(t.is_contiguous() for t in same.values())
        torch.testing.assert_close(outputs_and_gradients(run, same, None), expected, rtol=0, atol=0)


def test_gradients_of_any_strides(interpreter):
    """What comes back for a sum is expanded; for what is turned, turned."""
    for x in (latent(1, 5, 5, 2, 16, 16), expanded(1, 5, 5, 2, 16, 16, 16)):
        run, definition, _ = runs(x, return_lse=True)
        for change in (lambda t: t.sum(1), lambda t: t.transpose(1, 2)):
            agree(*(lambda f=f, **x: tuple(map(change, f(**x))) for f in (run, definition)), x, factor=3)


def test_same_bits(interpreter):
    for x in (latent(1, 5, 5, 2, 16, 16), expanded(1, 5, 5, 2, 16, 16, 16)):
        run, _, _ = runs(x, return_lse=True)
        same_bits(run, x, times=2)


@pytest.mark.parametrize("B, S, T", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (1, 0, 0)])
def test_nothing_in_nothing_out(interpreter, B, S, T):
    for x in (latent(B, S, T, 3, 16, 16), expanded(B, S, T, 3, 16, 16, 16)):
        for cu_seqlens in (None, packing([0, 0])) if S == T == 0 else (None,):
            run, definition, _ = runs(x, causal=False, cu_seqlens=cu_seqlens, return_lse=True)
            got, gradients = outputs_and_gradients(run, x, None)
            torch.testing.assert_close(got, list(definition(**x)))
            assert all(t.shape == given.shape and not t.any() for t, given in zip(gradients.values(), x.values()))


def operands(x, cu_seqlens=None):
    q, k = x["q"], x.get("kv", x.get("k_nope"))
    value_dim = x["v"].shape[3] if "v" in x else q.shape[3] // 2
    bounds = kernels._bounds(cu_seqlens, q.shape[1])
    return q, k, x.get("k_rope"), x.get("v"), bounds, value_dim, 0.2, True, 0, True


def check_operators(x, **more):
    inputs = operands(x, **more)
    torch.library.opcheck(torch.ops.nam56r.mla_triton.default, inputs)
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    out, lse, *kept = torch.ops.nam56r.mla_triton(*given)
    for dout, dlse in ((out, None), (None, lse)):
        inputs = dout, dlse, *given[:4], out, *kept, *given[4:-1]
        torch.library.opcheck(torch.ops.nam56r.mla_triton_backward.default, inputs)


def test_in_one_graph(interpreter):
    for x in (latent(1, 2, 2, 1, 16, 16), expanded(1, 2, 2, 1, 16, 16, 32)):
        check_operators(x)
        run, _, _ = runs(x, query_offset=3, return_lse=True)
        compiles(run, x, backend="aot_eager")


def problem(device, dims, dtype=torch.bfloat16, H=32, S=4096, **options):
    nope, rope, value = dims
    q = Spec((1, S, H, nope + rope), dtype)
    options = OPTIONS | options
    if value is None:
        kv = Spec((1, S, nope + rope), dtype)
        return Problem.of("latent_attention", device, q=q, kv=kv, value_dim=nope, **options)
    k_nope, k_rope, v = Spec((1, S, H, nope), dtype), Spec((1, S, rope), dtype), Spec((1, S, H, value), dtype)
    return Problem.of("mla_attention", device, q=q, k_nope=k_nope, k_rope=k_rope, v=v, **options)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("dims", [(64, 64, None), (512, 64, None), (64, 64, 64), (128, 64, 128), (192, 64, 256)])
def test_planned(dims, name):
    for dtype in DTYPES:
        asked = problem(DEVICES[name], dims, dtype, query_offset=7, return_lse=True)
        assert select(asked, "triton").name == "triton"


def test_refused():
    """Every reason at once."""
    asked = problem(Device("t4", "cuda", (7, 5)), (513, 65, 1024), torch.float64, S=2**26)
    assert kernels.mla_refuses(asked) == (
        "t4 is sm_75, but it takes sm_80 or later",
        "q is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "the nope dim is 513, but the Triton kernel takes 1 to 512",
        "the rope dim is 65, but the Triton kernel takes 0 to 64 beside 513 and 1024",
        "the value dim is 1024, but the Triton kernel takes 1 to 512",
        "S · H = 2147483648, but the Triton kernel takes up to 2^30",
    )
    small = Device("rtx4090", "cuda", (8, 9))
    assert kernels.latent_refuses(problem(small, (512, 64, None))) == ()
    (reason,) = kernels.latent_refuses(problem(small, (512, 64, None), torch.float32))
    assert "99 KiB" in reason and "float32 with dims over 128, here 512" in reason
    (reason,) = kernels.mla_refuses(problem(small, (512, 64, 512)))
    assert "99 KiB" in reason and "expanded dims over 256, here 512" in reason
    (reason,) = kernels.latent_refuses(problem(DEVICES["cpu"], (64, 64, None)))
    assert "set TRITON_INTERPRET=1" in reason


GPU_LATENT = [
    (2, 130, 130, 32, 64, 64), (1, 977, 977, 3, 64, 64), (1, 300, 300, 16, 512, 64), (1, 65, 65, 128, 512, 64),
    (1, 200, 200, 4, 96, 32), (1, 200, 200, 4, 128, 0), (1, 100, 100, 4, 64, 128),
]  # fmt: skip
GPU_EXPANDED = [
    (2, 130, 130, 3, 64, 64, 64), (1, 977, 977, 4, 128, 64, 128), (1, 300, 300, 4, 192, 64, 128),
    (1, 300, 300, 4, 192, 64, 256), (1, 200, 200, 6, 96, 32, 48), (1, 200, 200, 2, 512, 64, 512),
    (1, 200, 200, 2, 128, 128, 128), (1, 100, 100, 2, 24, 8, 40),
]  # fmt: skip


def drawn(shape, dtype):
    return (latent if len(shape) == 6 else expanded)(*shape, dtype, "cuda")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*GPU_LATENT, *GPU_EXPANDED], ids=str)
def test_gpu_agrees(shape, dtype, poisoned):
    x = drawn(shape, dtype)
    judge(x, **value(x, shape), return_lse=True)


GPU_SHAPES = [
    (1, 333, 333, 32, 64, 64),
    (1, 333, 333, 4, 512, 64),
    (1, 333, 333, 3, 64, 64, 64),
    (1, 333, 333, 2, 192, 64, 128),
]


@gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_agrees_packed(shape, dtype, causal, poisoned):
    x = drawn(shape, dtype)
    ends = packing([0, 1, 1, 130, 200, 333], "cuda")
    judge(x, **value(x, shape), cu_seqlens=ends, causal=causal, return_lse=True)


@gpu
@pytest.mark.parametrize("S, T, offset", [(130, 400, 270), (130, 400, 5), (333, 200, -150), (64, 64, -64)])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_agrees_with_other_keys(shape, S, T, offset, poisoned):
    x = drawn((1, S, T, *shape[3:]), torch.bfloat16)
    judge(x, **value(x, shape), query_offset=offset)


@gpu
def test_gpu_takes_any_strides(poisoned):
    for shape in GPU_SHAPES:
        x = drawn(shape, torch.bfloat16)
        wide = {n: torch.nn.functional.pad(t.detach(), (1, 2))[..., 1:-2].requires_grad_() for n, t in x.items()}
        every_other = {n: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, t in x.items()}
        for same in (wide, every_other):
            judge(same, **value(x, shape))


@gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_repeats_and_replays(shape, poisoned):
    x = drawn(shape, torch.bfloat16)
    for cu_seqlens in (None, packing([0, 20, 333], "cuda")):
        run, _, _ = runs(x, **value(x, shape), cu_seqlens=cu_seqlens, return_lse=True)
        same_bits(run, x)
        make = latent if "kv" in x else expanded
        replays(run, lambda seed: make(*shape, torch.bfloat16, "cuda", seed))


@gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_in_one_graph(shape):
    x = drawn(shape, torch.bfloat16)
    run, _, _ = runs(x, **value(x, shape), cu_seqlens=packing([0, 20, 333], "cuda"), return_lse=True)
    compiles(run, x)


@gpu
def test_gpu_operators():
    check_operators(latent(1, 100, 100, 4, 64, 64, torch.bfloat16, "cuda"))
    check_operators(
        expanded(1, 100, 100, 4, 64, 64, 64, torch.bfloat16, "cuda"), cu_seqlens=packing([0, 7, 100], "cuda")
    )


@gpu
def test_gpu_beyond_32_bit_offsets():
    """q, out and their gradients of more than 2^31 elements: the last sequence's are a sequence's alone."""
    B, S, H = 2**31 // (4096 * 32 * 128) + 2, 4096, 32
    one = latent(1, S, S, H, 64, 64, torch.bfloat16, "cuda")
    many = {n: t.detach().expand(B, *t.shape[1:]).contiguous().requires_grad_() for n, t in one.items()}
    run, _, _ = runs(one, value_dim=64)
    (out_one,), (out,) = ([run(**x)] for x in (one, many))
    assert torch.equal(out[-1], out_one[0])
    (dq_one,), (dq,) = (torch.autograd.grad(o.float().square().sum(), x["q"]) for o, x in ((out_one, one), (out, many)))
    assert torch.equal(dq[-1], dq_one[0])
