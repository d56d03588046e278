"""The CUDA indexer beside its definition, on a GPU of sm_90."""

import math

import pytest
import torch

from nam56r.kernels.dsa import index_top_k, reference
from nam56r.kernels.dsa.status import nan_scores

# kernel -> q and k as it takes them, and what its sums may lose of a row's highest score
KERNELS = {"cuda": (lambda x: x, 1e-5), "cuda_fp8": (reference.rounded_to_e4m3, 2e-3)}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.bfloat16, torch.float16]
CU = [0, 1, 1, 130, 200, 333]
NAN, INF = math.nan, math.inf


def draw(B, S, Hi, Di, *, dtype=torch.bfloat16, seed=0, whole=False):
    """q, k, weights; whole: small whole numbers, of which every score is exact, many of them equal."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = [
        torch.randn(shape, generator=generator, device="cuda") for shape in ((B, S, Hi, Di), (B, S, Di), (B, S, Hi))
    ]
    return [(t.clamp(-2, 2).round() if whole else t).to(dtype) for t in tensors]


def packed(bounds=CU):
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def scores_of(q, k, weights, cu_seqlens=None):
    """float64 [B, S, S], -inf where a key isn't seen."""
    S = q.shape[1]
    scores = torch.cat(
        [
            reference.index_scores(*(t.double() for t in (q[:, t : t + 64], k, weights[:, t : t + 64])))
            for t in range(0, S, 64)
        ],
        1,
    )
    seen = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    if cu_seqlens is not None:
        of = torch.bucketize(torch.arange(S, device=q.device), cu_seqlens[1:], right=True)
        seen &= of[:, None] == of
    return scores.masked_fill(~seen, -INF), seen


def taken(kernel, q, k, weights):
    as_taken, _ = KERNELS[kernel]
    return as_taken(q), as_taken(k), weights


def judge(kernel, q, k, weights, top_k, cu_seqlens=None):
    """Rising, as many as there are, and none left out that is above one taken by more than fp32's sums lose."""
    found = index_top_k(q, k, weights, top_k, cu_seqlens=cu_seqlens, kernel=kernel).long()
    scores, seen = scores_of(*taken(kernel, q, k, weights), cu_seqlens)
    here = found >= 0
    chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, torch.where(here, found, scores.shape[2]), True)[..., :-1]
    assert torch.equal(chosen.sum(-1), here.sum(-1)) and torch.equal(
        here.sum(-1), seen.sum(-1).clamp(max=top_k).expand(here.shape[:2])
    )
    assert not (chosen & ~seen).any()
    rising = found.diff(dim=-1)
    assert ((rising > 0) | ~here[..., 1:]).all()
    lowest = scores.masked_fill(~chosen, INF).amin(-1)
    highest = scores.masked_fill(chosen | ~seen, -INF).amax(-1)
    slack = KERNELS[kernel][1] * scores.masked_fill(~seen, 0).abs().amax(-1)
    assert (highest <= lowest + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Hi, Di", [(1, 32), (3, 64), (32, 64), (33, 64), (128, 64), (8, 128), (64, 128), (100, 128), (32, 32)]
)
@pytest.mark.parametrize("S, top_k", [(1, 1), (7, 16), (65, 16), (977, 64)])
@every_kernel
def test_shapes(kernel, S, top_k, Hi, Di, dtype):
    judge(kernel, *draw(2, S, Hi, Di, dtype=dtype), top_k)


@pytest.mark.parametrize("top_k", [1, 16, 100, 256, 2048, 4096])
@pytest.mark.parametrize("S", [1000, 5000])
@every_kernel
def test_long_rows(kernel, S, top_k):
    judge(kernel, *draw(1, S, 32, 64), top_k)


@pytest.mark.parametrize("Hi, Di", [(1, 32), (2, 64), (32, 64), (40, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("top_k", [16, 300])
@pytest.mark.parametrize("cu", [None, CU, [0, 2500]])
@every_kernel
def test_ties(kernel, Hi, Di, top_k, cu):
    """Scores that are exact, many equal: the very set of the definition."""
    S = cu[-1] if cu else 3000
    x = draw(1 if cu else 2, S, Hi, Di, whole=True)
    cu = packed(cu) if cu else None
    wanted = reference.index_top_k(*x, top_k, cu_seqlens=cu)
    assert torch.equal(index_top_k(*x, top_k, cu_seqlens=cu, kernel=kernel), wanted)


def of_scores(scores, Hi=2, Di=64):
    """Inputs whose score of key s is scores[s] for every query: relu(k) - relu(-k)."""
    S = len(scores)
    q, k = torch.zeros(1, S, Hi, Di, device="cuda"), torch.zeros(1, S, Di, device="cuda")
    weights = torch.zeros(1, S, Hi, device="cuda")
    q[..., 0, 0], q[..., 1, 0], weights[..., 0], weights[..., 1] = 1, -1, 1, -1
    k[0, :, 0] = scores
    return q.bfloat16(), k.bfloat16(), weights.bfloat16()


@pytest.mark.parametrize("name", ["rising", "falling", "equal", "zeros", "special", "nan", "steps", "tiny", "huge"])
@pytest.mark.parametrize("top_k", [1, 16, 256])
@every_kernel
def test_orders(kernel, name, top_k):
    """Rows that fill the lists at every key, at none, and with what isn't a number."""
    S = 2500
    at = torch.arange(S, device="cuda", dtype=torch.float32)
    special = torch.tensor([INF, 1.0, -INF, NAN, 0.0, -0.0, 2.0, NAN, -1.0, INF, -INF], device="cuda")
    scores = {
        "rising": at, "falling": -at, "equal": torch.ones_like(at), "zeros": at * 0, "nan": at * NAN,
        "special": special[torch.randint(len(special), (S,), generator=torch.Generator("cuda").manual_seed(0), device="cuda")],
        "steps": (at // 100) * (1 - at % 2 * 2), "tiny": at * 2.0**-130, "huge": (at - 1000) * 2.0**110,
    }[name]  # fmt: skip
    x = of_scores(scores)
    wanted = reference.index_top_k(*taken(kernel, *x), top_k)
    nan_scores("cuda")
    assert torch.equal(index_top_k(*x, top_k, kernel=kernel), wanted)
    odd = ~scores.isfinite() if kernel == "cuda_fp8" else scores.isnan()  # a row of e4m3 has no inf
    assert nan_scores("cuda") == odd.any().item() and not nan_scores("cuda")


@pytest.mark.parametrize("S", [700, 5000])
@every_kernel
def test_same_bits_and_a_graph(kernel, S):
    """Twice the same; replayed with other inputs, what eager gives for these."""
    first, other = draw(1, S, 32, 64), draw(1, S, 32, 64, seed=1)
    found = index_top_k(*first, 100, kernel=kernel)
    assert torch.equal(found, index_top_k(*first, 100, kernel=kernel))
    static = [t.clone() for t in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = index_top_k(*static, 100, kernel=kernel)
    for inputs in (other, first):
        for mine, theirs in zip(static, inputs):
            mine.copy_(theirs)
        graph.replay()
        assert torch.equal(replayed, index_top_k(*inputs, 100, kernel=kernel))


@every_kernel
def test_any_strides(kernel):
    q, k, weights = draw(2, 300, 32, 64)
    wanted = index_top_k(q, k, weights, 40, kernel=kernel)
    strided = [
        torch.stack((t, t), -1)[..., 0] if i == 0 else t.transpose(0, 1).contiguous().transpose(0, 1)
        for i, t in enumerate((q, k, weights))
    ]
    padded = torch.nn.functional.pad(q, (0, 8))[..., :64], torch.nn.functional.pad(k, (0, 3))[..., :64], weights.float()
    for x in (strided, padded):
        assert not x[0].is_contiguous() and torch.equal(index_top_k(*x, 40, kernel=kernel), wanted)
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (q, k)]
    assert all(t.is_contiguous() and t.data_ptr() % 16 for t in shifted)
    assert torch.equal(index_top_k(*shifted, weights, 40, kernel=kernel), wanted)


@pytest.mark.parametrize("name", ["dsa_index", "dsa_index_fp8"])
def test_registered_right(name):
    q, k, weights = draw(1, 65, 4, 64)
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.library.opcheck(getattr(torch.ops.nam56r, name), (q, k, weights.float(), 16, None, status))


@every_kernel
def test_nothing_in_nothing_out(kernel):
    for shape in ((0, 4), (2, 0)):
        assert index_top_k(*draw(*shape, 4, 64), 3, kernel=kernel).shape == (*shape, 3)
