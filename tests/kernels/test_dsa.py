"""DeepSeek sparse attention: the definitions against token-by-token ones and against Megatron's own functions."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nam56r.kernels.dsa import index_top_k, indexer_kl_loss, reference, sparse_latent_attention
from nam56r.kernels.dsa.status import nan_scores
from nam56r.kernels.mla import latent_attention
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec, candidates, select
from nam56r.kernels.testing import outputs_and_gradients, same_bits

NAN, INF = math.nan, math.inf
PACKED = [0, 5, 5, 6, 17, 17]


def drawer(seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    return draw


def indexer(B, S, Hi, Di, **options):
    draw = drawer(**options)
    return {"index_q": draw(B, S, Hi, Di), "index_k": draw(B, S, Di), "index_weights": draw(B, S, Hi)}


def attention(B, S, H, D, **options):
    draw = drawer(**{"seed": 1, **options})
    return {"q": draw(B, S, H, D), "kv": draw(B, S, D)}


def scored(scores):
    """Indexer inputs whose score of key s is scores[s] for every query: relu(k) − relu(−k) with two heads."""
    S = len(scores)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return (
        signs[:, None].expand(1, S, 2, 1),
        torch.tensor(scores, dtype=torch.float64)[None, :, None],
        signs.expand(1, S, 2),
    )


def top_k_of(scores, top_k, t):
    """The second definition, for one query: Python's stable sort."""
    keys = [s for s in range(t + 1) if not math.isnan(scores[s])]
    chosen = sorted(sorted(keys, key=lambda s: -scores[s])[:top_k])
    return chosen + [-1] * (top_k - len(chosen))


@pytest.mark.parametrize(
    "scores",
    [
        [3.0, 1.0, 2.0, 5.0, 4.0, 0.5],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, -0.0, 2.0, 0.0, -1.0, 2.0],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        [NAN, 1.0, NAN, 2.0, NAN, 0.0],
        [NAN, NAN, NAN, NAN, NAN, NAN],
        [INF, 1.0, INF, 2.0, INF, 0.0],
        [-INF, NAN, -INF, 1.0, -INF, NAN],
        [7.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 9])
def test_top_k_of_given_scores(scores, top_k):
    q, k, weights = scored(scores)
    found = index_top_k(q, k, weights, top_k)
    expected = [top_k_of(scores, top_k, t) for t in range(len(scores))]
    assert found.dtype == torch.int32 and found[0].tolist() == expected


def test_nan_scores_are_told_once():
    """Of keys that a query sees; what it doesn't see has no score."""
    q, k, weights = scored([1.0, 2.0, NAN, 3.0])
    nan_scores("cpu")
    index_top_k(q[:, :2], k[:, :2], weights[:, :2], 2)
    index_top_k(q, k, weights, 2, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    assert nan_scores("cpu") and not nan_scores("cpu")
    k[0, 3] = NAN
    weights = weights.clone()
    weights[0, 2:] = 0  # 0 · NaN is NaN, too
    index_top_k(q, k, weights, 2)
    assert nan_scores("cpu")
    index_top_k(q[:, :2], k[:, :2], weights[:, :2], 2)
    assert not nan_scores("cpu")


@pytest.mark.parametrize("S, Hi, top_k", [(1, 1, 1), (1, 3, 4), (9, 1, 3), (130, 4, 16), (257, 2, 64)])
def test_top_k_token_by_token(S, Hi, top_k):
    """Whole multiples, exact in every sum, with many ties; more queries than one block."""
    q, k, weights = (t.detach().mul(2).round() for t in indexer(2, S, Hi, 8).values())
    found = index_top_k(q, k, weights, top_k)
    for b in range(2):
        for t in range(S):
            scores = ((k[b] @ q[b, t].T).relu() @ weights[b, t]).tolist()
            assert found[b, t].tolist() == top_k_of(scores, top_k, t)


def test_top_k_packed_equals_separate():
    x = [t.detach() for t in indexer(1, 17, 3, 4).values()]
    together = index_top_k(*x, 4, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32))
    for first, end in zip(PACKED, PACKED[1:]):
        apart = index_top_k(*(t[:, first:end] for t in x), 4)
        assert torch.equal(together[:, first:end], torch.where(apart >= 0, apart + first, -1))


def test_top_k_strides_and_gradient():
    x = indexer(2, 20, 3, 4)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in x.values()]
    found = index_top_k(*x.values(), 5)
    assert torch.equal(found, index_top_k(*strided, 5)) and not found.requires_grad


def attended(q, kv, chosen, value_dim, scale):
    """The second definition, for one head of one query: q [D], kv [S, D], the positions chosen."""
    weights = [math.exp(scale * (q @ kv[s]).item()) for s in chosen]
    out = sum((w * kv[s, :value_dim] for w, s in zip(weights, chosen)), torch.zeros(value_dim, dtype=q.dtype))
    return out / (sum(weights) or 1.0), math.log(sum(weights)) if chosen else -INF


@pytest.mark.parametrize("S, H, top_k", [(1, 1, 1), (1, 2, 3), (12, 3, 4), (130, 1, 7)])
def test_sparse_attention_token_by_token(S, H, top_k):
    x = attention(2, S, H, 6)
    indices = index_top_k(*indexer(2, S, 2, 4).values(), top_k)
    indices[1, S // 2] = -1
    out, lse = sparse_latent_attention(**x, indices=indices, value_dim=4, scale=0.5)
    assert lse.dtype == torch.float64 and not lse.requires_grad
    for b in range(2):
        for t in range(S):
            chosen = [s for s in indices[b, t].tolist() if s >= 0]
            for h in range(H):
                expected, denominator = attended(x["q"][b, t, h], x["kv"][b], chosen, 4, 0.5)
                torch.testing.assert_close(out[b, t, h], expected)
                assert lse[b, t, h].item() == pytest.approx(denominator)


def test_sparse_attention_over_all_keys_is_latent_attention():
    x = attention(2, 140, 2, 6)
    indices = index_top_k(*indexer(2, 140, 2, 4).values(), 140)
    sparse = outputs_and_gradients(
        lambda q, kv: sparse_latent_attention(q, kv, indices, value_dim=4, scale=0.5)[0], x, None
    )
    torch.testing.assert_close(
        sparse, outputs_and_gradients(partial(latent_attention, value_dim=4, scale=0.5), x, None)
    )


def test_sparse_attention_gradients():
    x = attention(2, 5, 2, 3)
    indices = index_top_k(*indexer(2, 5, 2, 2).values(), 3)
    indices[0, 3] = -1
    assert torch.autograd.gradcheck(
        lambda q, kv: sparse_latent_attention(q, kv, indices, value_dim=2, scale=0.5)[0], tuple(x.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys(dtype):
    """Out 0, lse -inf, loss 0, gradient 0, and no NaN on the way (anomaly mode would raise)."""
    x, index = attention(1, 3, 2, 4, dtype=dtype), indexer(1, 3, 2, 4, dtype=dtype)
    indices = torch.full((1, 3, 2), -1, dtype=torch.int32)
    with torch.autograd.detect_anomaly(check_nan=True):
        out, lse = sparse_latent_attention(**x, indices=indices, value_dim=3, scale=0.5)
        loss = indexer_kl_loss(**index, **x, indices=indices, lse=lse, scale=0.5)
        gradients = torch.autograd.grad([out.sum(), loss.sum()], [*x.values(), *index.values()])
    assert out.dtype == dtype and lse.dtype == loss.dtype == torch.float32
    assert torch.equal(lse, torch.full_like(lse, -INF))
    assert not any(t.any() for t in (out, loss, *gradients))


def test_a_key_that_is_not_selected_does_not_matter():
    """NaN in a key that no query selects, position 0 included, leaves every result finite."""
    x, index = attention(1, 6, 2, 4), indexer(1, 6, 2, 4)
    with torch.no_grad():
        x["kv"][0, 0], index["index_k"][0, 0] = NAN, NAN
    indices = index_top_k(*index.values(), 3)
    assert indices[0, 0].tolist() == [-1, -1, -1] and 0 not in indices
    out, lse = sparse_latent_attention(**x, indices=indices, value_dim=3, scale=0.5)
    loss = indexer_kl_loss(**index, **x, indices=indices, lse=lse, scale=0.5)
    gradients = torch.autograd.grad([out.sum(), loss.sum()], [*x.values(), *index.values()])
    assert all(t.isfinite().all() for t in (out, loss, *gradients))


def test_packed_equals_separate():
    """Through the whole chain: indices of a packed row keep attention and loss within their sequences."""
    x, index = attention(1, 17, 2, 6), indexer(1, 17, 2, 4)

    def chain(cu_seqlens=None, **x):
        indices = index_top_k(*(x[name] for name in index), 4, cu_seqlens=cu_seqlens)
        out, lse = sparse_latent_attention(x["q"], x["kv"], indices, value_dim=4, scale=0.5)
        return out, lse, indexer_kl_loss(**x, indices=indices, lse=lse, scale=0.5)

    def apart(**x):
        rows = [chain(**{n: t[:, a:b] for n, t in x.items()}) for a, b in zip(PACKED, PACKED[1:]) if a < b]
        return tuple(torch.cat(pieces, 1) for pieces in zip(*rows))

    packed = partial(chain, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32))
    together, separate = (outputs_and_gradients(run, {**index, **x}, None) for run in (packed, apart))
    torch.testing.assert_close(together, separate)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("S, H", [(1, 1), (6, 3), (131, 2)])
def test_loss_token_by_token(S, H, dense):
    x, index = attention(2, S, H, 4), indexer(2, S, 3, 4)
    top_k = S if dense else 4
    indices = index_top_k(*index.values(), top_k)
    loss = indexer_kl_loss(**index, **x, indices=None if dense else indices, lse=None, scale=0.5)
    _, lse = sparse_latent_attention(**x, indices=indices, value_dim=2, scale=0.5)
    torch.testing.assert_close(
        loss, indexer_kl_loss(**index, **x, indices=None if dense else indices, lse=lse, scale=0.5)
    )
    for b in range(2):
        for t in range(S):
            chosen = indices[b, t][indices[b, t] >= 0]
            target = (0.5 * x["q"][b, t] @ x["kv"][b, chosen].T).softmax(-1).sum(0) / H
            scores = index["index_weights"][b, t] @ (index["index_q"][b, t] @ index["index_k"][b, chosen].T).relu()
            expected = (target * (target.log() - scores.log_softmax(-1))).sum()
            torch.testing.assert_close(loss[b, t], expected)


@pytest.mark.parametrize("dense", [False, True])
def test_loss_gradients(dense):
    index, x = indexer(1, 5, 2, 3), attention(1, 5, 2, 4)
    indices = None if dense else index_top_k(*index.values(), 3)
    run = partial(indexer_kl_loss, **x, indices=indices, lse=None, scale=0.5)
    assert torch.autograd.gradcheck(lambda *index: run(*index), tuple(index.values()))
    gradients = torch.autograd.grad(run(**index).sum(), tuple(x.values()), allow_unused=True)
    assert gradients == (None, None)


@pytest.mark.parametrize("empty", [(0, 4), (2, 0)], ids=["B=0", "S=0"])
def test_nothing_in_nothing_out(empty):
    x, index = attention(*empty, 2, 4), indexer(*empty, 2, 4)
    indices = index_top_k(*index.values(), 3)
    out, lse = sparse_latent_attention(**x, indices=indices, value_dim=3, scale=0.5)
    assert indices.shape == (*empty, 3) and out.shape == (*empty, 2, 3) and lse.shape == (*empty, 2)
    for which in (indices, None):
        assert indexer_kl_loss(**index, **x, indices=which, lse=None, scale=0.5).shape == empty


def test_strides_and_repeats():
    x, index = attention(2, 140, 2, 6, dtype=torch.float32), indexer(2, 140, 2, 4, dtype=torch.float32)
    indices = index_top_k(*index.values(), 9)

    def run(q, kv, **index):
        out, lse = sparse_latent_attention(q, kv, indices, value_dim=4, scale=0.5)
        return out, lse, indexer_kl_loss(**index, q=q, kv=kv, indices=indices, lse=lse, scale=0.5)

    same_bits(run, {**x, **index})
    every_other = {n: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, t in {**x, **index}.items()}
    torch.testing.assert_close(
        outputs_and_gradients(run, every_other, None), outputs_and_gradients(run, {**x, **index}, None)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_megatron_gives_the_same(packed):
    """Scores, top-k, loss of every query, its gradients, and attention, as stock Megatron computes them."""
    from megatron.core.transformer.experimental_attention_variant import dsa, dsa_masking

    B, S, H, top_k, scale = (1 if packed else 2), 17, 3, 4, 0.5
    x = attention(B, S, H, 6, dtype=torch.float32)
    index = indexer(B, S, 16, 4, dtype=torch.float32)  # 16 heads: an exact tie at 0 is unlikely
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    starts, ends = dsa_masking.generate_varlen_mask_params(cu_seqlens) if packed else (None, None)
    bounds = dict(varlen_starts=starts, varlen_ends=ends)
    mask = None if packed else torch.full((S, S), -INF).triu(1)

    q, k, weights = (t.transpose(0, 1) for t in index.values())  # Megatron's layout: sequence first
    query, key = x["q"].transpose(0, 1), x["kv"].transpose(0, 1).unsqueeze(2)
    indices = index_top_k(*index.values(), top_k, cu_seqlens=cu_seqlens)
    scores, chosen = dsa.fused_qk_topk_naive(q, k, weights, top_k, mask=mask, **bounds)
    assert torch.equal(chosen.sort(-1).values, indices.sort(-1).values)
    seen = scores.isfinite()
    torch.testing.assert_close(reference.index_scores(*index.values())[seen], scores[seen])

    theirs = dsa._unfused_absorbed_dsa_fn(query, key, indices, scale, 4, mask=mask, **bounds).transpose(0, 1)
    ours, lse = sparse_latent_attention(**x, indices=indices, value_dim=4, scale=scale)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, tuple(x.values()), weight) for o in (ours, theirs))):
        torch.testing.assert_close(a, b)

    group = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    for sparse in (True, False) if not packed else (True,):
        kwargs = dict(indices=indices, lse=lse) if sparse else dict(indices=None, lse=None)
        ours = indexer_kl_loss(**index, **x, **kwargs, scale=scale)

        def megatron(rows, per_token):
            return dsa.FusedDSAIndexerLoss.apply(
                q, weights, k, query, key.expand(-1, -1, H, -1), scale, top_k, 0.7, mask, sparse, group,
                starts, ends, None, rows, per_token,
            )[1]  # fmt: skip

        for b, t in [(0, 0), (0, 5), (B - 1, 9), (B - 1, S - 1)]:
            row = torch.zeros(B, S, dtype=torch.bool)
            row[b, t] = True
            torch.testing.assert_close(0.7 * ours[b, t], megatron(row, True), atol=1e-6, rtol=1e-5)
        mean = 0.7 * ours.mean()
        torch.testing.assert_close(mean, megatron(None, False))
        for a, b in zip(*(torch.autograd.grad(o, tuple(index.values())) for o in (mean, megatron(None, False)))):
            torch.testing.assert_close(a, b)


def test_selection_without_a_device():
    shapes = dict(q=(1, 4096, 32, 64), k=(1, 4096, 64), weights=(1, 4096, 32))
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
    for device, name in (("cpu", None), ("h200", "reference"), ("a100", "reference")):
        problem = Problem.of("index_top_k", DEVICES[device], **specs, top_k=256, cu_seqlens=None)
        assert select(problem, name).name == "reference"
    with pytest.raises(NoKernel, match="a100.*development kernel"):
        select(problem)


def test_fp8_is_never_taken_without_its_name():
    (fp8,) = (kernel for kernel in candidates("index_top_k") if kernel.name == "cuda_fp8")
    q = Spec((1, 64, 4, 64), torch.bfloat16)
    problem = Problem.of("index_top_k", DEVICES["h200"], q=q, k=q, weights=q, top_k=16, cu_seqlens=None)
    also = set(fp8.reasons(problem, by_name=False)) - set(fp8.reasons(problem, by_name=True))
    assert also == {"its inputs are rounded to fewer bits: it runs only when asked for by name (index_top_k=cuda_fp8)"}


def test_rounded_to_e4m3():
    """The nearest of all numbers that e4m3 has, times the least power of two that keeps a row within 448."""
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    e4m3 = e4m3[e4m3.isfinite()].unique()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=generator) * 2.0 ** torch.randint(-90, 90, (40, 1), generator=generator)
    x[0], x[1, 1:], x[2, 0], x[3, 0] = 0, 0, 448 * 2.0**7, 449 * 2.0**7
    x[2, 1:], x[3, 1:] = 1.0, 1.0
    rounded = reference.rounded_to_e4m3(x)
    for row, found in zip(x.double(), rounded.double()):
        scale = 1.0
        while row.abs().max() > 448 * scale:
            scale *= 2
        while 0 < row.abs().max() <= 224 * scale:
            scale /= 2
        off = (found[:, None] / scale - e4m3).abs().amin(-1)
        nearest = (row[:, None] / scale - e4m3).abs().amin(-1)
        assert not off.any() and torch.equal((row / scale - found / scale).abs(), nearest)
    for odd in (math.inf, -math.inf, math.nan):
        x[5, 3] = odd
        assert reference.rounded_to_e4m3(x)[5].isnan().all() and reference.rounded_to_e4m3(x)[4].isfinite().all()


def test_refusals_name_the_argument():
    x, index = attention(2, 6, 2, 4), indexer(2, 6, 3, 4)
    q, k, weights = index.values()
    with pytest.raises(ValueError, match="top_k is 0, but must be a whole number of at least 1"):
        index_top_k(q, k, weights, 0)
    with pytest.raises(ValueError, match=r"index_top_k: weights is \[2, 6, 2\], but must be \[B=2, S=6, Hi=3\]"):
        index_top_k(q, k, weights[..., :2], 3)
    with pytest.raises(TypeError, match="k is float32, but must be float64"):
        index_top_k(q, k.float(), weights, 3)
    with pytest.raises(ValueError, match="B must be 1, not 2"):
        index_top_k(q, k, weights, 3, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    indices = index_top_k(q, k, weights, 3)
    good = partial(sparse_latent_attention, **x, indices=indices, value_dim=3, scale=0.5)
    with pytest.raises(ValueError, match="value_dim is 5, but must be from 1 to L.Dr = 4"):
        good(value_dim=5)
    with pytest.raises(TypeError, match="indices is int64, but must be int32"):
        good(indices=indices.long())
    with pytest.raises(ValueError, match="indices go from -1 to 9, but must be from 0 to 5, or -1 for none"):
        good(indices=indices.index_fill(1, torch.tensor(3), 9))
    with pytest.raises(TypeError, match="scale is str, but must be a number"):
        good(scale="0.5")
    with pytest.raises(TypeError, match="sparse_latent_attention: indices is NoneType"):
        good(indices=None)
    with pytest.raises(ValueError, match=r"indexer_kl_loss: lse is \[2, 6, 1\], but must be \[B=2, S=6, H=2\]"):
        indexer_kl_loss(**index, **x, indices=indices, lse=torch.zeros(2, 6, 1), scale=0.5)


@pytest.mark.gpu
def test_gpu_equals_cpu_and_fits():
    """The production geometry, S 4096, 32 heads, top 256: within 24 GiB, and the same as on the CPU at a few queries."""
    S, H, top_k = 4096, 32, 256
    x, index = attention(1, S, H, 128, dtype=torch.bfloat16, device="cuda"), indexer(1, S, 32, 64, device="cuda")
    index = {n: t.detach().bfloat16().requires_grad_() for n, t in index.items()}
    torch.cuda.reset_peak_memory_stats()
    indices = index_top_k(*index.values(), top_k, kernel="reference")
    out, lse = sparse_latent_attention(**x, indices=indices, value_dim=64, scale=0.1, kernel="reference")
    loss = indexer_kl_loss(**index, **x, indices=indices, lse=lse, scale=0.1, kernel="reference")
    gradients = torch.autograd.grad([out.sum(), loss.sum()], [*x.values(), *index.values()])
    assert all(g.isfinite().all() for g in gradients)
    assert torch.cuda.max_memory_allocated() < 24 * 2**30
    for t in (0, 100, 255, 256, S - 1):
        chosen = indices[0, t][indices[0, t] >= 0].long()
        assert len(chosen) == min(t + 1, top_k) and chosen.max() <= t and (chosen.diff() > 0).all()
        keys, query = x["kv"][0, chosen].double(), x["q"][0, t].double()
        scores = 0.1 * query @ keys.T
        torch.testing.assert_close(lse[0, t].double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out[0, t].double(), scores.softmax(-1) @ keys[:, :64], atol=1e-2, rtol=1e-2)
