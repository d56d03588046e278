"""Triton's sparse attention beside the definition, interpreted and on a GPU; the sum by key beside a plain loop."""

from functools import partial

import pytest
import torch

from nam56r.kernels.dsa import by_key, index_top_k, reference, sparse_latent_attention
from nam56r.kernels.dsa import triton as kernels
from nam56r.kernels.registry import DEVICES, Device, NoKernel, Problem, Spec, select
from nam56r.kernels.testing import agree, compiles, outputs_and_gradients, replays, same_bits

gpu = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ["triton", "triton_atomic"]
NAN, INF = torch.nan, torch.inf


def drawn(B, S, H, L, Dr, K, dtype=torch.float32, device="cpu", seed=0):
    """Inputs, with as many keys of s ≤ t as there are, in any order, and -1 anywhere between."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    width = max(S, K)  # positions from S on stand for none
    position = torch.arange(width)
    rank = torch.rand(B, S, width, generator=generator).masked_fill_(position > torch.arange(S)[:, None], 2)
    indices = rank.argsort(-1)[..., :K]
    indices = torch.where(rank.gather(-1, indices) < 1, indices, -1)
    indices = indices.gather(-1, torch.rand(B, S, K, generator=generator).argsort(-1)).to(device, torch.int32)
    return dict(q=draw(B, S, H, L + Dr), kv=draw(B, S, L + Dr), indices=indices)


def runs(x, kernel="triton", **options):
    """Triton, the definition, and the definition in the inputs' dtype throughout; lse 0 where there is no key."""
    options = dict(scale=x["q"].shape[-1] ** -0.5) | options

    def of(operator, **more):
        def run(**x):
            out, lse = operator(**x, **options, **more)
            assert torch.equal(lse == -INF, (x["indices"] < 0).all(-1, keepdim=True).expand_as(lse))
            return out, lse.masked_fill(lse == -INF, 0)

        return run

    definition = reference.sparse_latent_attention
    return (
        of(sparse_latent_attention, kernel=kernel),
        of(definition),
        of(definition, compute_dtype=x["q"].dtype),
    )


def judge(x, **options):
    """Beside the definition, with what that loses in the inputs' dtype as measure."""
    run, definition, coarse = runs(x, **options)
    # fp32: dS is a difference of sums that are taken in two orders, dout nopeᵀ and delta; the definition has one
    agree(run, definition, x, same_dtype=coarse, factor=3 if x["q"].dtype == torch.float32 else 2)


# B, S, H, and the latent, rope and top_k; blocks of heads and of keys are 16
SHAPES = [
    (1, 17, 3, 16, 16, 5),
    (2, 6, 20, 48, 16, 17),
    (1, 9, 1, 64, 64, 40),
    (1, 12, 3, 144, 16, 5),
    (1, 12, 20, 32, 0, 5),
    (1, 20, 1, 32, 0, 17),
]


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees(interpreter, shape, kernel):
    judge(drawn(*shape), value_dim=shape[3], kernel=kernel)


def test_both_launches_are_tested():
    one = [kernels._launches(torch.float32, *shape[2:5], large=True).one for shape in SHAPES]
    assert any(one) and not all(one)


def test_packed(interpreter):
    """Through index_top_k's own indices of packed sequences."""
    x = drawn(1, 17, 2, 16, 16, 1)
    q, k, weights = torch.randn(1, 17, 3, 4), torch.randn(1, 17, 4), torch.randn(1, 17, 3)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 17, 17], dtype=torch.int32)
    judge(x | {"indices": index_top_k(q, k, weights, 4, cu_seqlens=cu_seqlens)}, value_dim=16)


@pytest.mark.parametrize("kernel", NAMES)
def test_every_query_selects_the_same_keys(interpreter, kernel):
    x = drawn(2, 9, 2, 16, 16, 3)
    judge(x | {"indices": torch.tensor([3, -1, 0], dtype=torch.int32).expand(2, 9, 3)}, value_dim=16, kernel=kernel)


@pytest.mark.parametrize("kernel", NAMES)
def test_queries_without_keys(interpreter, kernel):
    x = drawn(2, 5, 3, 16, 16, 4)
    x["indices"][1, 3] = -1
    judge(x, value_dim=16, kernel=kernel)
    x["indices"][:] = -1
    run, _, _ = runs(x, value_dim=16, kernel=kernel)
    outputs, gradients = outputs_and_gradients(run, x, None)
    assert not any(t.any() for t in (*outputs, *gradients.values()))


def test_a_key_that_is_not_selected_does_not_matter(interpreter):
    """Nor one that -1 could be taken for."""
    x = drawn(1, 9, 2, 16, 16, 5)
    x["indices"][(x["indices"] == 0) | (x["indices"] == 8)] = -1
    with torch.no_grad():
        x["kv"][0, [0, 8]] = NAN
    for kernel in NAMES:
        run, _, _ = runs(x, value_dim=16, kernel=kernel)
        outputs, gradients = outputs_and_gradients(run, x, None)
        assert all(t.isfinite().all() for t in (*outputs, *gradients.values()))
        assert not gradients["1:kv"][0, [0, 8]].any()


def test_small_and_large_scores(interpreter):
    draws = [drawn(1, 20, 2, 16, 16, 9, seed=seed) for seed in range(3)]
    for scale in (1e-3, 2.0):
        run, definition, _ = runs(draws[0], value_dim=16, scale=scale)
        agree(run, definition, draws, factor=3)


def test_one_key_has_nearly_all_the_weight(interpreter):
    """dP and the sum of P dP are then nearly equal: with out's rounding in the sum the error is 1.5 times PyTorch's."""
    half = torch.float16  # the interpreter doesn't know bfloat16
    draws = [drawn(2, 3, 3, 16, 16, 3, half, seed=seed) for seed in range(4)]
    run, definition, coarse = runs(draws[0], value_dim=16, scale=0.5)
    agree(run, definition, draws, same_dtype=coarse, factor=1.2)


def turned_with_gaps(t):
    return t.transpose(0, 1).repeat_interleave(2, -1).transpose(0, 1)[..., ::2]


def test_any_strides(interpreter):
    x = drawn(2, 5, 2, 16, 16, 3)
    run, _, _ = runs(x, value_dim=16)
    same = {n: turned_with_gaps(t.detach()).requires_grad_(t.requires_grad) for n, t in x.items()}
    assert not any(t.is_contiguous() for t in same.values())
    expected = outputs_and_gradients(run, x, None)
    torch.testing.assert_close(outputs_and_gradients(run, same, None), expected, rtol=0, atol=0)


def test_gradients_of_any_strides(interpreter):
    """What comes back for a sum is expanded; for what is turned, turned."""
    x = drawn(1, 9, 2, 16, 16, 5)
    run, definition, _ = runs(x, value_dim=16)
    for change in (lambda t: t.sum(1), lambda t: t.transpose(1, 2)):
        agree(*(lambda f=f, **x: tuple(map(change, f(**x))) for f in (run, definition)), x, factor=3)


def test_only_rows_that_need_it_are_copied():
    """For loads of 16 bytes."""
    rows = torch.randn(2, 3, 4, 48)
    for fit in (rows, rows.transpose(0, 1), rows[..., 16:], rows[:, ::2], rows[:1].expand(5, 3, 4, 48)):
        assert kernels.aligned(fit) is fit
    padded = torch.nn.functional.pad(rows, (0, 3))
    for other in (rows[..., 1:33], padded[..., :-3], rows[..., ::3], rows.mT, rows.sum().expand(3, 16)):
        copy = kernels.aligned(other)
        assert copy.is_contiguous() and torch.equal(copy, other)


def test_same_bits(interpreter):
    x = drawn(1, 5, 2, 16, 16, 4)
    same_bits(runs(x, value_dim=16)[0], x, times=2)


@pytest.mark.parametrize("H", [2, 20])
def test_several_chunks(interpreter, monkeypatch, H):
    x = drawn(2, 7, H, 16, 16, 3)
    run, _, _ = runs(x, value_dim=16)
    whole = outputs_and_gradients(run, x, None)
    monkeypatch.setattr(by_key, "MOST_BYTES", 2 * 2 * 3 * 32 * 4)  # two queries'
    assert len(list(by_key.chunks(2, 7, 3, 32 * 4))) == 4
    torch.testing.assert_close(outputs_and_gradients(run, x, None), whole)
    same_bits(run, x, times=2)


def of_one_key(*where):
    """dq, a difference of equals, is nothing but fp32's rounding of dP; the rest is judged as ever."""
    for kernel in NAMES:
        x = drawn(2, 12, 20, 32, 16, 1, *where)
        run, _, _ = runs(x, value_dim=32, kernel=kernel)
        assert outputs_and_gradients(run, x, None)[1]["0:q"].abs().max() < 1e-5
        judge(x | {"q": x["q"].detach()}, value_dim=32, kernel=kernel)


def test_one_key(interpreter):
    of_one_key()


@pytest.mark.parametrize("B, S, K", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_in_nothing_out(interpreter, B, S, K):
    x = drawn(B, S, 3, 16, 16, K)
    for kernel in NAMES:
        run, definition, _ = runs(x, value_dim=16, kernel=kernel)
        torch.testing.assert_close(outputs_and_gradients(run, x, None), outputs_and_gradients(definition, x, None))


@pytest.mark.parametrize("batch, queries, top_k", [(1, 4096, 256), (1, 65536, 256), (3, 1000, 2048), (2, 5, 10**7)])
def test_chunks(batch, queries, top_k):
    slices = list(by_key.chunks(batch, queries, top_k, 256))
    assert [t for s in slices for t in range(queries)[s]] == list(range(queries))
    sizes = [s.stop - s.start for s in slices]
    assert max(sizes) == 1 or batch * max(sizes) * top_k * 256 <= by_key.MOST_BYTES
    assert not list(by_key.chunks(batch, 0, top_k, 256))


def placed(indices, order):
    """For every chunk and key [B · S] the pairs, as flat positions in indices, in the order of the rows."""
    _, S, K = indices.shape
    result = []
    for i, chunk in enumerate(order.chunks):
        starts = order.starts[i * order.slots : (i + 1) * order.slots + 1 : order.runs].cpu()
        at = torch.full((order.pairs,), -1)
        pair = torch.arange(indices.numel()).view(indices.shape)[:, chunk]
        there = (indices[:, chunk] >= 0).cpu()
        at[order.position.cpu()[:, chunk][there].long()] = pair[there]
        result.append([at[a:b].tolist() for a, b in (starts - starts[0]).unfold(0, 2, 1).tolist()])
    return result


def sorted_by_key(indices, chunks):
    B, S, K = indices.shape
    result = [[[] for _ in range(B * S)] for _ in chunks]
    for chunk, keys in zip(chunks, result):
        for b in range(B):
            for s in range(S)[chunk]:
                for k, key in enumerate(indices[b, s].tolist()):
                    if key >= 0:
                        keys[b * S + key].append((b * S + s) * K + k)
    return result


@pytest.mark.parametrize("most", [1, 1000, 10**9], ids=["chunks of a query", "some chunks", "one chunk"])
@pytest.mark.parametrize("B, S, K", [(1, 1, 1), (2, 21, 3), (1, 40, 33), (2, 9, 12)])
def test_order(interpreter, monkeypatch, B, S, K, most):
    """Beside a plain loop: of each chunk, keys one after the other, and the pairs of a key by query."""
    monkeypatch.setattr(by_key, "MOST_BYTES", most)
    monkeypatch.setattr(by_key, "QUERIES", 3)
    monkeypatch.setattr(by_key, "BLOCK", 32)
    for runs in (5, 256):
        monkeypatch.setattr(by_key, "RUNS", runs)
        indices = drawn(B, S, 1, 16, 0, K)["indices"]
        for given in (indices, turned_with_gaps(indices)):
            order = by_key.Order(given, 8)
            assert len(order.chunks) * order.runs <= runs
            assert placed(indices, order) == sorted_by_key(indices, order.chunks)


def test_order_is_within_its_bytes(interpreter, monkeypatch):
    for most, (B, S, K) in ((10**9, (2, 40, 8)), (5000, (1, 300, 8)), (1, (1, 300, 8))):
        monkeypatch.setattr(by_key, "MOST_BYTES", most)
        order = by_key.Order(torch.full((B, S, K), -1, dtype=torch.int32), 32)
        taken = order.pairs * 32 + order.position.nbytes + order.starts.nbytes
        assert taken <= by_key.buffer_bytes(B * S, K, 32) + 4


@pytest.mark.parametrize("width", [1, 24, 130])
@pytest.mark.parametrize("S", [1, 7])
def test_sum_by_key(interpreter, monkeypatch, S, width):
    """Beside a plain loop, with several tiles of rows to a key; rows behind a chunk's pairs aren't read."""
    B, K = 2, 4
    monkeypatch.setattr(by_key, "TILE", 2 * 128)
    monkeypatch.setattr(by_key, "PARTS", 2)
    monkeypatch.setattr(by_key, "MOST_BYTES", 5 * B * K * 2 * width)
    indices = drawn(B, S, 1, 16, 0, K)["indices"]
    order = by_key.Order(indices, 2 * width)
    total = torch.randint(-9, 10, (B, S, width)).float()
    expected = total.clone()
    for i, chunk in enumerate(order.chunks):
        some = indices[:, chunk]
        values = torch.randint(-9, 10, (*some.shape, width)).half()
        rows = torch.full((order.pairs, width), NAN).half()
        rows[order.position[:, chunk][some >= 0].long()] = values[some >= 0]
        order.add_rows(total, rows, i)
        for b, s, k in (some >= 0).nonzero().tolist():
            expected[b, some[b, s, k]] += values[b, s, k]
    assert torch.equal(total, expected)


def check_operators(x, value_dim):
    for atomic in (False, True):
        inputs = *x.values(), value_dim, 0.2, True, atomic
        torch.library.opcheck(torch.ops.nam56r.dsa_attention_triton.default, inputs)
        given = [t.detach() for t in x.values()]
        out, _, *kept = torch.ops.nam56r.dsa_attention_triton(*given, value_dim, 0.2, True, atomic)
        inputs = out, *given, out, *kept, value_dim, 0.2, atomic
        torch.library.opcheck(torch.ops.nam56r.dsa_attention_triton_backward.default, inputs)


def test_in_one_graph(interpreter):
    x = drawn(1, 3, 1, 16, 16, 2)
    check_operators(x, 16)
    compiles(partial(kernels.sparse_latent_attention, value_dim=16, scale=0.2), x, backend="aot_eager")


def problem(device, latent, rope, dtype=torch.bfloat16, H=32, S=4096, K=256):
    specs = dict(q=Spec((1, S, H, latent + rope), dtype), kv=Spec((1, S, latent + rope), dtype))
    specs["indices"] = Spec((1, S, K), torch.int32)
    return Problem.of("sparse_latent_attention", device, **specs, value_dim=latent)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("dims", [(64, 64), (512, 64), (128, 128), (48, 0)])
def test_planned(dims, name):
    for dtype in DTYPES:
        asked = problem(DEVICES[name], *dims, dtype)
        assert select(asked).name == "triton"
        assert select(asked, "triton_atomic").name == "triton_atomic"


def test_on_a_cpu_by_name_only(interpreter):
    asked = problem(DEVICES["cpu"], 64, 64)
    assert select(asked).name == "reference"
    assert [select(asked, name).name for name in NAMES] == NAMES


def test_refused():
    """Every reason at once."""
    asked = problem(Device("t4", "cuda", (7, 5)), 513, 65, torch.float64, S=2**28)
    assert kernels.refuses(asked) == (
        "t4 is sm_75, but it takes sm_80 or later",
        "q is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "the latent dim is 513, but the Triton kernel takes multiples of 16 from 16 to 512",
        "the rope dim is 65, but the Triton kernel takes multiples of 16 from 0 to 64 beside 513",
        f"B · S · max(H, K, 16) = {2**36}, but the Triton kernel takes up to 2^34",
    )
    latent, rope = kernels.refuses(problem(DEVICES["h200"], 40, 24))
    assert "latent dim is 40" in latent and "rope dim is 24" in rope
    small = Device("rtx4090", "cuda", (8, 9))
    assert kernels.refuses(problem(small, 512, 64)) == ()
    (reason,) = kernels.refuses(problem(small, 512, 64, torch.float32))
    assert "99 KiB" in reason and "float32 with a latent over 128, here 512" in reason
    with pytest.raises(NoKernel, match="set TRITON_INTERPRET=1"):
        select(problem(DEVICES["cpu"], 64, 64), "triton_atomic")


GPU_SHAPES = [
    (1, 300, 32, 64, 64, 256),
    (1, 333, 64, 64, 64, 100),
    (1, 333, 128, 64, 64, 64),
    (1, 130, 128, 512, 64, 64),
]
GPU_EDGES = [
    (2, 1000, 32, 64, 64, 256), (2, 977, 1, 64, 64, 17), (1, 300, 3, 128, 0, 2), (1, 200, 32, 128, 128, 300),
    (1, 200, 16, 144, 16, 40), (2, 65, 20, 48, 16, 33), (1, 100, 8, 512, 64, 4096), (1, 100, 5, 80, 48, 7),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*GPU_SHAPES, *GPU_EDGES], ids=str)
def test_gpu_agrees(shape, dtype, kernel, poisoned):
    judge(drawn(*shape, dtype, "cuda"), value_dim=shape[3], kernel=kernel)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_one_key(dtype, poisoned):
    of_one_key(dtype, "cuda")


@gpu
def test_gpu_queries_without_keys_and_nan_elsewhere(poisoned):
    for shape in GPU_SHAPES:
        x = drawn(*shape, torch.bfloat16, "cuda")
        x["indices"][:, 7] = -1
        x["indices"][(x["indices"] == 0) | (x["indices"] == shape[1] - 1)] = -1
        judge(x, value_dim=shape[3])
        with torch.no_grad():
            x["kv"][:, [0, -1]] = NAN
        outputs, gradients = outputs_and_gradients(runs(x, value_dim=shape[3])[0], x, None)
        assert all(t.isfinite().all() for t in (*outputs, *gradients.values()))


@gpu
def test_gpu_every_query_selects_the_same_keys(poisoned):
    x = drawn(1, 1000, 8, 64, 64, 5, torch.bfloat16, "cuda")
    x["indices"] = torch.tensor([3, -1, 0, 999, 500], dtype=torch.int32, device="cuda").expand(1, 1000, 5)
    for kernel in NAMES:
        judge(x, value_dim=64, kernel=kernel)


@gpu
def test_gpu_takes_any_strides(poisoned):
    for shape in GPU_SHAPES:
        x = drawn(*shape, torch.bfloat16, "cuda")
        wide = {n: torch.nn.functional.pad(t.detach(), (1, 2))[..., 1:-2] for n, t in x.items()}
        every_other = {n: t.detach().repeat_interleave(2, -1)[..., ::2] for n, t in x.items()}
        for same in (wide, every_other):
            judge({n: t.requires_grad_(x[n].requires_grad) for n, t in same.items()}, value_dim=shape[3])


@gpu
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_repeats_and_replays(shape, several, monkeypatch, poisoned):
    if several:
        monkeypatch.setattr(by_key, "MOST_BYTES", 2**20)
    x = drawn(*shape, torch.bfloat16, "cuda")
    run = partial(sparse_latent_attention, value_dim=shape[3], scale=0.1, kernel="triton")
    same_bits(run, x)
    replays(run, lambda seed: drawn(*shape, torch.bfloat16, "cuda", seed))


@gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_in_one_graph(shape):
    x = drawn(*shape, torch.bfloat16, "cuda")
    check_operators(x, shape[3])
    compiles(partial(sparse_latent_attention, value_dim=shape[3], scale=0.1, kernel="triton"), x)


@gpu
def test_gpu_beyond_32_bit_offsets():
    """q, out and their gradients of more than 2^31 elements: the last sequence's are a sequence's alone, but for the
    chunks in which kv's gradient is summed."""
    B, S, H = 2**31 // (4096 * 32 * 64) + 2, 4096, 32
    one = drawn(1, S, H, 64, 64, 8, torch.bfloat16, "cuda")
    many = {n: t.detach().expand(B, *t.shape[1:]).contiguous().requires_grad_(t.requires_grad) for n, t in one.items()}
    run = partial(sparse_latent_attention, value_dim=64, scale=0.1, kernel="triton")
    results = []
    for x in (one, many):
        out, _ = run(**x)
        dout = one["q"].detach()[..., :64].expand(x["q"].shape[0], S, H, 64)
        results.append([out, *torch.autograd.grad(out, (x["q"], x["kv"]), dout)])
    (*same, dkv_one), (*of_many, dkv) = results
    assert all(torch.equal(b[-1], a[0]) for a, b in zip(same, of_many))
    torch.testing.assert_close(dkv[-1], dkv_one[0])
