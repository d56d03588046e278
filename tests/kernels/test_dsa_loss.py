"""Triton's indexer loss beside the definition, sparse and dense stage, interpreted and on a GPU."""

from functools import partial

import pytest
import torch

from nam56r.kernels.dsa import by_key, index_top_k, indexer_kl_loss, reference, triton_loss
from nam56r.kernels.registry import DEVICES, Device, Problem, Spec, select
from nam56r.kernels.testing import agree, compiles, outputs_and_gradients, replays, same_bits

gpu = pytest.mark.gpu
NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE = 0.2

# B, S, H, L + Dr, Hi, Di, K; interpreted (fp32) blocks are of 16 keys, heads or queries
SHAPES = [(2, 9, 3, 80, 1, 16, 5), (1, 18, 20, 32, 20, 48, 17), (1, 41, 1, 160, 3, 32, 40)]
SMALL = SHAPES[0]
STAGES = pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    B, S, H, D, Hi, Di, _ = shape
    shapes = dict(index_q=(B, S, Hi, Di), index_k=(B, S, Di), index_weights=(B, S, Hi), q=(B, S, H, D), kv=(B, S, D))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def with_lse(x, indices):
    """With the definition's lse, as the attention would give it."""
    chosen, (B, S, _) = indices, x["kv"].shape
    if indices is None:
        keys = torch.arange(S, device=x["kv"].device).expand(B, S, S)
        chosen = keys.masked_fill(keys > keys.mT, -1)
    q, kv = (x[name].detach().double() for name in ("q", "kv"))
    lse = reference.sparse_latent_attention(q, kv, chosen, value_dim=1, scale=SCALE)[1].float()
    return {**x, "indices": indices, "lse": lse}


def selection(shape, seed=0):
    """Any keys, with gaps; the last query has none."""
    (B, S, *_, K), generator = shape, torch.Generator().manual_seed(seed)
    order = torch.rand(B, S, max(S, K), generator=generator).argsort(-1)[..., :K]
    gaps = (order >= S) | (torch.rand(order.shape, generator=generator) < 0.2)
    gaps[:, -1] = True
    return order.masked_fill(gaps, -1).to(torch.int32)


def inputs(shape, dense, seed=0):
    return with_lse(draw(shape, seed=seed), None if dense else selection(shape))


run, run_atomic = (partial(indexer_kl_loss, scale=SCALE, kernel=name) for name in ("triton", "triton_atomic"))
definition = partial(reference.indexer_kl_loss, scale=SCALE)


def judge(draws, run=run, **options):
    """Beside the definition, with what that loses in the inputs' dtype as measure."""
    dtype = (draws if isinstance(draws, dict) else draws[0])["index_q"].dtype
    # fp32: dI is a difference of two nearly equal shares, whose products are summed in another order
    options = (
        dict(factor=3 if dtype == torch.float32 else 2, same_dtype=partial(definition, compute_dtype=dtype)) | options
    )
    return agree(run, definition, draws, **options)


@STAGES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees(interpreter, shape, dense):
    judge([inputs(shape, dense, seed) for seed in range(3)])


@STAGES
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_computes_lse(interpreter, shape, dense):
    x = inputs(shape, dense)
    got, gradients = outputs_and_gradients(run, x | {"lse": None}, None)
    assert gradients["3:q"] is None and gradients["4:kv"] is None
    torch.testing.assert_close((got, gradients), outputs_and_gradients(run, x, None))


@STAGES
def test_few_keys(interpreter, dense):
    """Loss and gradient of one key are exactly 0; what is left of a few is near a rounding."""
    for S, K in ((1, 1), (3, 1), (3, 2)):
        x = with_lse(draw((1, S, 1, 48, 1, 16, K)), None if dense else torch.arange(K).int().expand(1, S, K))
        got, want = outputs_and_gradients(run, x, None), outputs_and_gradients(definition, x, None)
        torch.testing.assert_close(got, want)
        if (S if dense else K) == 1:
            assert not got[0][0].any() and not any(t.any() for t in got[1].values() if t is not None)


@STAGES
def test_loss_alone_is_the_same(interpreter, dense):
    x = inputs(SMALL, dense)
    loss = run(**x)
    with torch.no_grad():
        assert torch.equal(run(**x), loss) and loss.requires_grad


def test_rows_without_keys(interpreter):
    """Loss 0, gradient 0, and no NaN on the way; no slots at all, too."""
    none = torch.full((2, 9, 5), -1, dtype=torch.int32)
    x = with_lse(draw(SMALL), none)
    for change in ({}, {"lse": None}, {"indices": none[..., :0]}):
        (loss,), gradients = outputs_and_gradients(run, x | change, None)
        assert not loss.any() and not any(t.any() for t in gradients.values() if t is not None)


@pytest.mark.parametrize("run", [run, run_atomic])
def test_a_key_that_is_not_selected_does_not_matter(interpreter, run):
    indices = selection(SMALL)
    indices[indices == 0] = -1
    x = with_lse(draw(SMALL), indices)
    expected = outputs_and_gradients(run, x, None)
    with torch.no_grad():
        x["kv"][:, 0], x["index_k"][:, 0] = NAN, NAN
    torch.testing.assert_close(outputs_and_gradients(run, x, None), expected, rtol=0, atol=0)


@STAGES
@pytest.mark.parametrize("name", ["index_q", "index_weights", "q"])
def test_a_nan_is_not_lost(interpreter, name, dense):
    x = inputs(SMALL, dense)
    expected = run(**x)
    with torch.no_grad():
        x[name][0, 4].view(-1)[0] = NAN
    loss = run(**x)
    assert loss[0, 4].isnan()
    loss[0, 4] = expected[0, 4]
    assert torch.equal(loss, expected)


@STAGES
def test_a_target_of_zeros(interpreter, dense):
    """As by the definition: loss and gradient 0, where an lse far from the scores leaves nothing."""
    x = inputs(SMALL, dense)
    x["lse"].fill_(1e4)
    for f in (run, definition):
        (loss,), gradients = outputs_and_gradients(f, x, None)
        assert not loss.any() and not any(t.any() for t in gradients.values() if t is not None)


@STAGES
def test_large_scores(interpreter, dense):
    x = {name: (t.detach() * 8).requires_grad_() for name, t in draw(SMALL).items()}
    x = with_lse(x, None if dense else selection(SMALL))
    (loss,), gradients = outputs_and_gradients(run, x, None)
    (expected,), _ = outputs_and_gradients(definition, x, torch.float64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in gradients.values() if t is not None)


@STAGES
def test_any_chunks_give_the_same(interpreter, monkeypatch, dense):
    """One query each, and three or so."""
    x = inputs(SMALL, dense)
    expected = outputs_and_gradients(run, x, None)
    for most in (1, 450 if dense else 2000):
        monkeypatch.setattr(by_key, "MOST_BYTES", most)
        torch.testing.assert_close(outputs_and_gradients(run, x, None), expected)


def test_any_split_of_heads_gives_the_same(interpreter, monkeypatch):
    x = inputs(SHAPES[1], dense=True)
    expected = outputs_and_gradients(run, x, None)
    for programs in (1, 6):  # one part, and three of 20 heads
        monkeypatch.setattr(triton_loss, "PROGRAMS", programs)
        torch.testing.assert_close(outputs_and_gradients(run, x, None), expected)


def turned_with_gaps(t):
    return t.detach().transpose(0, 1).repeat_interleave(2, -1).transpose(0, 1)[..., ::2].requires_grad_(t.requires_grad)


def strided(x, change=turned_with_gaps):
    return {name: None if t is None else change(t) for name, t in x.items()}


@STAGES
def test_any_strides(interpreter, dense):
    x = inputs(SMALL, dense)
    expected = outputs_and_gradients(run, x, None)
    torch.testing.assert_close(outputs_and_gradients(run, strided(x), None), expected, rtol=0, atol=0)


@STAGES
def test_gradients_of_any_strides(interpreter, dense):
    """What comes back for a mean is expanded; for what is turned, turned."""
    x = inputs(SMALL, dense)
    for change in (torch.Tensor.mean, torch.Tensor.t):
        agree(*(lambda f=f, **x: change(f(**x)) for f in (run, definition)), x, factor=3)


@STAGES
def test_other_dtypes(interpreter, dense):
    """Weights and attention in another dtype than the index; lse in fp64."""
    x = inputs(SMALL, dense)
    x["index_weights"] = x["index_weights"].detach().to(torch.bfloat16).requires_grad_()
    x |= {name: x[name].detach().half() for name in ("q", "kv")} | {"lse": x["lse"].double()}
    assert outputs_and_gradients(run, x, None)[1]["2:index_weights"].dtype == torch.bfloat16
    agree(run, definition, x, factor=3)


@pytest.mark.parametrize("index_heads", [3, 64])
def test_sixteen_bits(interpreter, index_heads):
    """dq is summed features first where heads don't fill a product's rows. The interpreter doesn't know bfloat16."""
    shape = (1, 9, 3, 32, index_heads, 16, 5)
    judge([with_lse(draw(shape, torch.float16, seed=seed), selection(shape)) for seed in range(3)])


@STAGES
def test_same_bits(interpreter, dense):
    same_bits(run, inputs(SMALL, dense), times=2)


def test_atomic_agrees(interpreter):
    """The dense stage has no atomics."""
    judge([inputs(SMALL, False, seed) for seed in range(3)], run_atomic)
    x = inputs(SMALL, dense=True)
    got, want = (outputs_and_gradients(f, x, None) for f in (run_atomic, run))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@STAGES
@pytest.mark.parametrize("B, S", [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(interpreter, B, S, dense):
    x = draw((B, S, 2, 32, 2, 16, 3))
    for f in (run, run_atomic):
        call = partial(f, indices=None if dense else torch.empty(B, S, 3, dtype=torch.int32), lse=None)
        (loss,), gradients = outputs_and_gradients(call, x, None)
        assert loss.shape == (B, S) and loss.dtype == torch.float32
        assert all(t is None or t.shape == given.shape for t, given in zip(gradients.values(), x.values()))


def check_operators(x):
    x = {name: None if t is None else t.detach() for name, t in x.items()}
    index = [x[name] for name in ("index_q", "index_k", "index_weights")]
    q, kv, indices, lse = (x[name] for name in ("q", "kv", "indices", "lse"))
    rest = q, kv, indices, lse, SCALE, False, True
    torch.library.opcheck(
        torch.ops.nam56r.dsa_loss_triton.default, (*(t.clone().requires_grad_() for t in index), *rest)
    )
    loss, d_scores = torch.ops.nam56r.dsa_loss_triton(*index, *rest)
    arguments = loss, *index, d_scores, indices, q, kv, lse, SCALE, False
    torch.library.opcheck(torch.ops.nam56r.dsa_loss_triton_backward.default, arguments)


@STAGES
def test_in_one_graph(interpreter, dense):
    """The kernel's own function: the operator's check of indices reads them on a CPU."""
    x = inputs((1, 3, 1, 16, 1, 16, 2), dense)
    check_operators(x)
    compiles(partial(triton_loss.indexer_kl_loss, scale=SCALE), x, backend="aot_eager", eager=run)


def problem(device, shape=(1, 4096, 32, 128, 32, 64, 256), dtype=torch.bfloat16, dense=False, lse=True):
    B, S, H, D, Hi, Di, K = shape
    shapes = dict(index_q=(B, S, Hi, Di), index_k=(B, S, Di), index_weights=(B, S, Hi), q=(B, S, H, D), kv=(B, S, D))
    specs = {name: Spec(shape, dtype) for name, shape in shapes.items()}
    specs["indices"] = None if dense else Spec((B, S, K), torch.int32)
    specs["lse"] = Spec((B, S, H), torch.float32) if lse else None
    return Problem.of("indexer_kl_loss", device, **specs)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("heads, width", [(32, 128), (128, 576)])
def test_planned(heads, width, dense, name):
    for dtype in DTYPES:
        for lse in (True, False):
            asked = problem(DEVICES[name], (1, 4096, heads, width, 64, 128, 256), dtype, dense, lse)
            assert select(asked).name == "triton"
            assert select(asked, "triton_atomic").name == "triton_atomic"


def test_every_width_has_an_lse():
    """The attention that makes it takes any width this kernel does."""
    for width in range(16, 577, 16):
        for dense in (False, True):
            assert (
                triton_loss.refuses(problem(DEVICES["h200"], (1, 64, 2, width, 2, 16, 8), dense=dense, lse=False)) == ()
            )


def test_refused():
    """Every reason at once."""
    asked = problem(Device("t4", "cuda", (7, 5)), (1, 2**31, 129, 584, 0, 144, 8), torch.float64)
    assert triton_loss.refuses(asked) == (
        "t4 is sm_75, but it takes sm_80 or later",
        "index_q is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "index_weights is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "q is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "H = 129, but the Triton kernel takes 1 to 128",
        "Hi = 0, but the Triton kernel takes 1 to 128",
        "L + Dr = 584, but the Triton kernel takes multiples of 16 up to 576",
        "Di = 144, but the Triton kernel takes multiples of 16 up to 128",
        "B · S = 2147483648, but the Triton kernel counts up to 2^31 - 1",
    )
    (reason,) = triton_loss.refuses(problem(DEVICES["cpu"]))
    assert "set TRITON_INTERPRET=1" in reason


GPU_SHAPES = [(1, 333, 32, 128, 32, 64, 256), (1, 300, 128, 576, 64, 128, 256), (2, 130, 3, 80, 5, 48, 40)]
MORE_GPU_SHAPES = [
    (1, 700, 32, 128, 32, 64, 256), (1, 100, 20, 272, 128, 128, 100), (1, 100, 16, 576, 1, 16, 17),
    (2, 65, 1, 16, 3, 80, 1), (1, 40, 64, 560, 16, 112, 300),
]  # fmt: skip


def on_gpu(shape, dense, dtype=torch.bfloat16, seed=0):
    """Inputs as a layer has them: the top keys, fewer than K for the first queries, and the attention's lse."""
    x = draw(shape, dtype, "cuda", seed)
    x["index_weights"] = (x["index_weights"].detach() * 0.1).requires_grad_()
    index = [x[name] for name in ("index_q", "index_k", "index_weights")]
    return with_lse(x, None if dense else index_top_k(*index, shape[-1], kernel="reference"))


@gpu
@STAGES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*GPU_SHAPES, *MORE_GPU_SHAPES], ids=str)
def test_gpu_agrees(shape, dtype, dense, poisoned):
    if dtype == torch.float32:  # few enough that hardly an x lies within rounding of relu's bend
        shape = (shape[0], min(shape[1], 60), *shape[2:])
    x = on_gpu(shape, dense, dtype)
    judge(x)
    judge(x | {"lse": None})


@gpu
@pytest.mark.parametrize("run", [run, run_atomic])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_agrees_with_any_selection(shape, run, poisoned):
    judge(with_lse(draw(shape, torch.bfloat16, "cuda"), selection(shape).cuda()), run)


@gpu
@STAGES
@pytest.mark.parametrize("of_index, of_attention", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gpu_takes_other_dtypes(of_index, of_attention, dense, poisoned):
    """Weights have the attention's."""
    x = on_gpu((1, 60, *GPU_SHAPES[0][2:]), dense, of_attention)
    x |= {name: x[name].detach().to(of_index).requires_grad_() for name in ("index_q", "index_k")}
    judge(x, same_dtype=partial(definition, compute_dtype=torch.bfloat16))


@gpu
@STAGES
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_takes_any_strides(shape, dense, poisoned):
    def padded(t):
        return torch.nn.functional.pad(t.detach(), (1, 2))[..., 1:-2].requires_grad_(t.requires_grad)

    x = on_gpu(shape, dense)
    for change in (padded, turned_with_gaps):
        judge(strided(x, change))


@gpu
@STAGES
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_repeats_and_replays(shape, dense, poisoned):
    same_bits(run, on_gpu(shape, dense))
    replays(run, lambda seed: on_gpu(shape, dense, seed=seed))


@gpu
def test_gpu_replays_with_its_own_lse(poisoned):
    for dense in (False, True):
        replays(run, lambda seed: on_gpu(GPU_SHAPES[0], dense, seed=seed) | {"lse": None})


@gpu
@STAGES
def test_gpu_any_chunks_give_the_same(monkeypatch, dense, poisoned):
    x = on_gpu(GPU_SHAPES[0], dense)
    outputs, gradients = outputs_and_gradients(run, x, None)
    monkeypatch.setattr(by_key, "MOST_BYTES", 2**18)
    again, chunked = outputs_and_gradients(run, x, None)
    torch.testing.assert_close(again, outputs, rtol=0, atol=0)
    torch.testing.assert_close(chunked, gradients)


@gpu
@STAGES
def test_gpu_in_one_graph(dense):
    x = on_gpu(GPU_SHAPES[0], dense)
    check_operators(x)
    compiles(run, x)


@gpu
@STAGES
def test_gpu_beyond_32_bit_offsets(dense):
    """q of more than 2^31 elements: the last sequence's loss and gradient are a sequence's alone."""
    S, H, D = 4096, 32, 128
    B = 2**31 // (S * H * D) + 2
    one = on_gpu((1, S, H, D, 4, 16, 16), dense)
    many = strided(one, lambda t: t.detach().expand(B, *t.shape[1:]).contiguous().requires_grad_(t.requires_grad))
    losses = [run(**x) for x in (one, many)]
    gradients = [torch.autograd.grad(t.square().sum(), x["index_q"])[0] for t, x in zip(losses, (one, many))]
    for alone, among in (losses, gradients):
        assert torch.equal(among[-1], alone[0])
