"""The CUDA kernels of MLA: values and gradients beside the float64 definition at edges of every kind, on a GPU of sm_90."""

from functools import partial

import pytest
import torch

from nam56r.kernels.mla import latent_attention, merge_attention, mla_attention, reference
from nam56r.kernels.testing import agree, outputs_and_gradients, replays, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.bfloat16, torch.float16]
CU = [0, 1, 1, 130, 200, 333]
EXPANDED = [(64, 64, 64), (128, 64, 128)]


def draw(shapes, dtype=torch.bfloat16, seed=0, factor=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        name: (factor * torch.randn(shape, generator=generator, device="cuda")).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def latent(B, S, H, T=None, **options):
    return draw({"q": (B, S, H, 128), "kv": (B, S if T is None else T, 128)}, **options)


def expanded(B, S, H, dims, T=None, **options):
    (Dn, Dr, Dv), T = dims, S if T is None else T
    return draw({"q": (B, S, H, Dn + Dr), "k_nope": (B, T, H, Dn), "k_rope": (B, T, Dr), "v": (B, T, H, Dv)}, **options)


def operator_of(form):
    return partial(latent_attention, value_dim=64) if form == "absorbed" else mla_attention


def judge(x, scale=0.09, factor=2.0, **options):
    """Values and gradients of both results, out and lse; x may be several draws."""
    options = {"return_lse": True, "scale": scale, **options}
    one = x if isinstance(x, dict) else x[0]
    if "kv" in one:
        options["value_dim"] = 64
        ours, definition = latent_attention, reference.latent_attention
    else:
        ours, definition = mla_attention, reference.mla_attention
    plain = partial(definition, compute_dtype=one["q"].dtype, **options)
    agree(partial(ours, kernel="cuda", **options), partial(definition, **options), x, same_dtype=plain, factor=factor)


def packed(bounds=CU):
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 3, 28, 32, 128])
@pytest.mark.parametrize("S", [1, 2, 7, 64, 65, 130, 977])
def test_absorbed(S, H, dtype):
    judge(latent(2, S, H, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", EXPANDED, ids=str)
@pytest.mark.parametrize(
    "S, H",
    [(1, 1), (2, 3), (7, 2), (47, 1), (48, 2), (49, 2), (64, 1), (65, 2), (97, 1), (130, 3), (977, 4), (129, 128)],
)
def test_expanded(S, H, dims, dtype):
    judge(expanded(2, S, H, dims, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [CU, [0, 333], [0, 0, 0, 333, 333], [0, *range(1, 334)]], ids=len)
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_packed(form, bounds, causal):
    x = latent(1, 333, 5) if form == "absorbed" else expanded(1, 333, 3, form)
    judge(x, cu_seqlens=packed(bounds), causal=causal)


@pytest.mark.parametrize(
    "S, T, offset, causal",
    [(70, 200, 100, True), (70, 200, 130, True), (70, 200, 500, True), (170, 200, -50, True), (33, 500, 0, False),
     (33, 20, -3, True), (200, 1, 0, True), (5, 7, -100, True)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_offsets(form, S, T, offset, causal):
    """Queries in the middle of the keys, before and past them; some see nothing, so that lse isn't finite there."""
    x = latent(2, S, 8, T) if form == "absorbed" else expanded(2, S, 3, form, T)
    judge(x, query_offset=offset, causal=causal, return_lse=bool(offset >= 0))
    options = dict(scale=0.09, query_offset=offset, causal=causal, return_lse=True)
    run = operator_of(form)
    with torch.no_grad():
        (out, lse), (_, exact) = (run(**x, **options, kernel=kernel) for kernel in ("cuda", "reference"))
    blind = exact == -torch.inf
    assert torch.equal(lse == -torch.inf, blind) and not out[blind].any()


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_no_keys(form):
    x = latent(2, 5, 4, 0) if form == "absorbed" else expanded(2, 5, 4, form, 0)
    run = operator_of(form)
    out, lse = run(**x, scale=0.1, return_lse=True, kernel="cuda")
    assert not out.any() and (lse == -torch.inf).all()
    assert not torch.autograd.grad(out.sum(), x["q"])[0].any()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_no_queries(form, shape):
    x = latent(*shape, 3) if form == "absorbed" else expanded(*shape, form, 3)
    run = operator_of(form)
    out = run(**x, scale=0.1, kernel="cuda")
    assert out.shape == (*shape, 64 if form == "absorbed" else form[2])
    assert not any(t.any() for t in torch.autograd.grad(out.sum(), list(x.values()), allow_unused=True))


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_scores_that_leap(form):
    """Early keys a hundred times as long: scores differ by hundreds, and the top rises late."""
    x = latent(2, 600, 8) if form == "absorbed" else expanded(2, 600, 2, form)
    with torch.no_grad():
        for name in ("kv", "k_nope"):
            if name in x:
                x[name][:, :150] *= 60
                x[name][:, 150:300] *= 10
    judge(x)


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 3.0])
def test_scales(form, scale):
    judge(latent(1, 300, 4) if form == "absorbed" else expanded(1, 300, 2, form), scale=scale)


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("S", [2, 3, 6, 17, 300])
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_one_key_has_nearly_all_the_weight(form, S, scale):
    """dP and the sum of P dP are then nearly equal: out's rounding, which the sum is made of, would be all of dS."""
    draws = [latent(2, S, 3, seed=i) if form == "absorbed" else expanded(2, S, 3, form, seed=i) for i in range(4)]
    judge(draws, scale=scale, factor=1.3)


def rising(form, factor, dtype=torch.bfloat16, seed=0):
    """The first keys' scores are above those beside the diagonal, which weights are relative to."""
    x = (
        latent(1, 500, 5, dtype=dtype, seed=seed)
        if form == "absorbed"
        else expanded(1, 500, 2, form, dtype=dtype, seed=seed)
    )
    for name in ("kv", "k_nope", "k_rope"):
        if name in x:
            x[name].data[:, :150] *= factor
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [4, 30, 200])
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_scores_that_rise(form, factor, dtype):
    """By some 2^13, which a weight may be; by 2^150 and more, for which a tile is done again."""
    judge(rising(form, factor, dtype))
    judge(rising(form, factor, dtype), cu_seqlens=packed([0, 30, 470, 500]))
    same_bits(partial(operator_of(form), scale=0.09, kernel="cuda"), rising(form, factor, dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_what_is_not_finite_stays_where_it_is(form, bad):
    """In one query it is in that query's row only; in one key, in the rows that see it."""
    run = partial(operator_of(form), scale=0.09, return_lse=True, kernel="cuda")
    x = {name: t.detach() for name, t in rising(form, 1).items()}
    wanted = run(**x)
    # a key's last feature is no part of a value, which would spoil rows that don't see it: 0 times inf
    key = "kv" if form == "absorbed" else "k_rope"
    for name, at, rows in (("q", (0, 300, 1, 7), slice(300, 301)), (key, (0, 400, -1), slice(400, 500))):
        changed = x | {name: x[name].clone()}
        changed[name][at] = bad
        for got, want in zip(run(**changed), wanted):
            touched = torch.zeros_like(want, dtype=torch.bool)
            touched[:, rows] = True
            torch.testing.assert_close(got[~touched], want[~touched], rtol=2**-7, atol=2**-7)
        assert not torch.isfinite(run(**changed)[0][:, rows]).all()


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_strides(form):
    """Megatron's [S, B, ...] seen transposed, an offset of one element, every other element, an expanded batch."""
    x = latent(2, 130, 4) if form == "absorbed" else expanded(2, 130, 2, form)
    plain = {n: t.detach() for n, t in x.items()}
    transposed = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in plain.items()}
    wide = {n: torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for n, t in plain.items()}
    every_other = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in plain.items()}
    one_batch = {n: t[:1].expand(2, *t.shape[1:]) for n, t in plain.items()}
    for same in (transposed, wide, every_other, one_batch):
        judge({n: t.requires_grad_() for n, t in same.items()})


def test_context_parallel():
    """Two ranks hold the chunks (0, 3) and (1, 2) of a sequence, as Megatron cuts it; parts merge to the whole."""
    x = latent(1, 512, 8)
    run = partial(latent_attention, value_dim=64, scale=0.09, return_lse=True, kernel="cuda")

    def ranks(q, kv):
        chunks = [slice(128 * i, 128 * i + 128) for i in range(4)]
        outs = [None] * 4
        for mine in ((0, 3), (1, 2)):
            for c in mine:
                parts = [run(q[:, chunks[c]], kv[:, chunks[k]], query_offset=128 * (c - k)) for k in range(4)]
                outs[c] = merge_attention(*zip(*parts))[0]
        return torch.cat(outs, 1)

    definition = partial(reference.latent_attention, value_dim=64, scale=0.09)
    agree(ranks, definition, x, same_dtype=partial(definition, compute_dtype=torch.bfloat16))


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_same_bits(form):
    x = latent(2, 1111, 32) if form == "absorbed" else expanded(2, 1111, 4, form)
    same_bits(partial(operator_of(form), scale=0.09, kernel="cuda"), x)


@pytest.mark.parametrize("cu", [False, True])
@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_replays(form, cu):
    run = partial(operator_of(form), scale=0.09, return_lse=True, kernel="cuda")
    make = (lambda seed: latent(1, 333, 8, seed=seed)) if form == "absorbed" else (
        lambda seed: expanded(1, 333, 2, form, seed=seed)
    )  # fmt: skip
    if not cu:
        return replays(run, make)
    bounds = {1: CU, 2: [0, 7, 100, 100, 301, 333]}
    replays(run, lambda seed: make(seed) | {"cu_seqlens": packed(bounds[seed])})


@pytest.mark.parametrize("form", ["absorbed", *EXPANDED], ids=str)
def test_opcheck(form):
    x = latent(1, 70, 2) if form == "absorbed" else expanded(1, 70, 2, form)
    arguments = (*x.values(), *((None, None) if form == "absorbed" else ()), None, 0.1, True, 0, True)
    torch.library.opcheck(torch.ops.nam56r.mla_forward.default, arguments)


def test_compiles():
    x = latent(1, 200, 4)
    run = partial(latent_attention, value_dim=64, scale=0.1, kernel="cuda")
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, x, None), outputs_and_gradients(run, x, None))


@pytest.mark.parametrize("form", ["absorbed", (128, 64, 128)], ids=str)
def test_long_rows(form):
    """q and its gradient pass 2^31 elements; the first and the last tokens are judged."""
    S, H = (140000, 128) if form == "absorbed" else (92000, 128)
    x = latent(1, S, H) if form == "absorbed" else expanded(1, S, H, form)
    assert x["q"].numel() > 2**31
    bounds = packed([0, 100, S - 100, S])
    run = operator_of(form)
    out = run(**x, scale=0.09, cu_seqlens=bounds, kernel="cuda")
    dout = torch.randn_like(out)
    gradients = dict(zip(x, torch.autograd.grad(out, list(x.values()), dout)))
    definition = partial(reference.latent_attention, value_dim=64) if form == "absorbed" else reference.mla_attention
    for part in (slice(0, 100), slice(S - 100, S)):
        few = {n: t.detach()[:, part].double().requires_grad_() for n, t in x.items()}
        exact = definition(**few, scale=0.09)
        torch.testing.assert_close(out[:, part].double(), exact, atol=0.02, rtol=0.02)
        for name, g in zip(few, torch.autograd.grad(exact, list(few.values()), dout[:, part].double())):
            error = (gradients[name][:, part].double() - g).norm() / g.norm()
            assert error < 0.02, f"{name}: {error:.3g}"
