"""RoPE of MLA: tables and definitions beside Megatron's, Triton beside the definitions, interpreted and on a GPU."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding, _yarn_get_mscale

from nam56r.kernels.mla import (
    Yarn,
    mla_latents,
    mla_queries,
    positions_of,
    rope_reference,
    rope_tables,
    rope_triton,
)
from nam56r.kernels.registry import DEVICES, Device, NoKernel, Problem, Spec, candidates, select
from nam56r.kernels.testing import agree, flatten, kernels_here, outputs_and_gradients, replays, same_bits

gpu = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]
PACKED = [0, 5, 5, 6, 17, 17]
QUERIES, LATENTS = partial(mla_queries, kernel="triton"), partial(mla_latents, kernel="triton")
NAMES = kernels_here("mla_queries")
DEEPSEEK = Yarn(scaling_factor=40, mscale=0.707, mscale_all_dim=0.707)
YARNS = [
    Yarn(),
    DEEPSEEK,
    Yarn(scaling_factor=16, original_max_position_embeddings=512, beta_fast=8, beta_slow=2, mscale_all_dim=0.3),
    Yarn(scaling_factor=4, beta_fast=500, beta_slow=400, correction_range_round_to_int=False),
    Yarn(scaling_factor=4, beta_fast=1, beta_slow=1, correction_range_round_to_int=False),  # no frequency between
]


def maker(seed, device):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype, first=False):
        """first: a transposed [S, B, …], as Megatron's activations are."""
        shape = (shape[1], shape[0], *shape[2:]) if first else shape
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return (drawn.transpose(0, 1) if first else drawn).requires_grad_()

    return draw


def tables(S, Dr, packed, device):
    """cos, sin and positions: those of packed sequences where S allows it, or of some rows in any order, or none."""
    rows = 2 * S + 3 if packed else S
    cos, sin = rope_tables(rows, Dr, 500.0, device=device)
    if not packed:
        return {"cos": cos, "sin": sin}
    if S == PACKED[-1]:
        return {
            "cos": cos,
            "sin": sin,
            "positions": positions_of(torch.tensor(PACKED, dtype=torch.int32), S).to(device),
        }
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(S))[:S]
    return {"cos": cos, "sin": sin, "positions": places.int().to(device)}


def queries(
    B=2, S=17, H=3, Dn=16, Dr=16, L=None, *, packed=False, first=False, dtype=torch.float32, device="cpu", seed=0,
):  # fmt: skip
    draw = maker(seed, device)
    made = {"q": draw(B, S, H, Dn + Dr, dtype=dtype, first=first)} | tables(S, Dr, packed, device)
    return made | {"up": draw(H, Dn, L, dtype=dtype)} if L else made


def latents(
    B=2, S=17, Lq=24, L=20, Dr=8, *, q=True, norms=(True, True), packed=False, first=False, dtype=torch.float32,
    weights=None, device="cpu", seed=0,
):  # fmt: skip
    draw = maker(seed, device)
    made = {"q_latent": draw(B, S, Lq, dtype=dtype, first=first) if q else None}
    made |= {"kv": draw(B, S, L + Dr, dtype=dtype, first=first)} | tables(S, Dr, packed, device)
    if q and norms[0]:
        made["q_weight"] = draw(Lq, dtype=weights or dtype)
    if norms[1]:
        made["kv_weight"] = draw(L, dtype=weights or dtype)
    return made


def assert_same(mine, same):
    for a, b in zip(flatten(mine), flatten(same), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


def bits(run, made):
    outputs, gradients = outputs_and_gradients(run, made, None)
    return [*outputs, *gradients.values()]


# the tables


@pytest.fixture
def on_cpu(monkeypatch):
    """Megatron's embeddings ask for the CUDA device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("theta, dim", [(500_000, 64), (10_000, 2), (10_000.0, 18)])
def test_tables_are_megatrons(theta, dim):
    length = 3000
    angle = RotaryEmbedding(dim, 1.0, rotary_base=theta, use_cpu_initialization=True).get_freqs_non_repeated(length)
    close_to_megatrons(rope_tables(length, dim, theta), angle, 1)


@pytest.mark.parametrize("yarn", YARNS, ids=str)
@pytest.mark.parametrize("theta, dim", [(500_000, 64), (10_000, 2), (10_000, 18)])
def test_yarn_tables_are_megatrons(yarn, theta, dim, on_cpu):
    length = 3000
    module = YarnRotaryEmbedding(dim, rotary_base=theta, use_cpu_initialization=True, **vars(yarn))
    emb, factor = module.get_emb(length)
    close_to_megatrons(rope_tables(length, dim, theta, yarn=yarn), emb[:, 0, 0, : dim // 2], factor)
    assert yarn.concentration == pytest.approx(factor)
    assert yarn.score_factor == pytest.approx(_yarn_get_mscale(yarn.scaling_factor, yarn.mscale_all_dim) ** 2)


def close_to_megatrons(mine, angle, factor):
    """Megatron's angles are products of fp32 frequencies, a few roundings off, so wrong by as much of themselves."""
    wrong = 8 * torch.finfo(torch.float32).eps * angle.abs() + 1e-6
    for t, theirs in zip(mine, (angle.cos(), angle.sin())):
        assert t.dtype == torch.float32 and t.is_contiguous()
        assert ((t - theirs * factor).abs() <= factor * wrong).all()


@pytest.mark.parametrize("yarn", [None, DEEPSEEK], ids=str)
def test_tables_are_right_at_a_million(yarn):
    cos, sin = rope_tables(1_000_001, 4, 500_000, yarn=yarn)
    factor = yarn.concentration if yarn else 1.0
    for place in (0, 1, 999_999, 1_000_000):
        angle = place * 500_000.0 ** (-1 / 2) / (yarn.scaling_factor if yarn else 1)  # pair 1 turns slowly: all scaled
        for t, exact in ((cos[place, 1], math.cos(angle)), (sin[place, 1], math.sin(angle))):
            assert abs(t.item() - factor * exact) < 1e-7
        assert abs(cos[place, 0].item() - factor * math.cos(place)) < 1e-7


def test_tables_refuse_everything_at_once():
    with pytest.raises(ValueError, match="dim is 7, but must be even, from 2; length is -1.*; theta is 1, but"):
        rope_tables(-1, 7, 1)
    with pytest.raises(ValueError, match="Yarn: scaling_factor is 0, beta_slow is -1.0, but must be positive"):
        Yarn(scaling_factor=0, beta_slow=-1.0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), max_size=6))
def test_positions(lengths):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if lengths or not sum(lengths):
        positions = positions_of(bounds, sum(lengths))
        assert positions.dtype == torch.int32
        assert positions.tolist() == [place for length in lengths for place in range(length)]


@pytest.mark.parametrize(
    "bounds, message",
    [([0, 3], "must rise from 0 to S = 4"), ([0, 3, 2, 4], "must rise"), ([0], "holds no sequence"), ([], "is empty")],
)
def test_positions_refuse(bounds, message):
    with pytest.raises(ValueError, match=f"positions_of: cu_seqlens .*{message}"):
        positions_of(torch.tensor(bounds, dtype=torch.int32), 4)


# the definitions


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
def test_definition_is_megatrons(interleaved, packed, on_cpu):
    """Megatron's function, with angles whose cos and sin are the tables: every bit."""
    S, H, Dn, Dr = PACKED[-1], 3, 5, 6
    # where there are as many angles as tokens, Megatron lets a packed sequence go on from the one before
    emb = RotaryEmbedding(Dr, 1.0, rotary_base=100, use_cpu_initialization=True).get_emb(S + packed)
    angle = emb[:, 0, 0, : Dr // 2]
    q, kv = torch.randn(1, S, H, Dn + Dr), torch.randn(1, S, Dn + Dr)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    config = SimpleNamespace(rotary_interleaved=False, apply_rope_fusion=False, mrope_section=None)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def megatron(x):  # [S, H, Dr]
        x = x if packed else x.unsqueeze(1)
        turned = apply_rotary_pos_emb(
            x, emb, config, cu_seqlens=cu_seqlens, cp_group=alone, mla_rotary_interleaved=interleaved
        )
        return turned if packed else turned.squeeze(1)

    options = dict(cos=angle.cos(), sin=angle.sin(), interleaved=interleaved, kernel="reference")
    options["positions"] = positions_of(cu_seqlens, S) if packed else None
    out = mla_queries(q, **options)
    assert torch.equal(out[..., :Dn], q[..., :Dn])
    assert torch.equal(out[0, ..., Dn:], megatron(q[0, ..., Dn:]))
    _, out = mla_latents(None, kv, **options)
    assert torch.equal(out[..., :Dn], kv[..., :Dn])
    assert torch.equal(out[0, :, Dn:], megatron(kv[0, :, None, Dn:]).squeeze(1))


def test_definition_of_the_norms():
    made = latents(dtype=torch.float64, L=9)
    q, kv = mla_latents(**made, eps=1e-3, kernel="reference")
    norm = torch.nn.functional.rms_norm
    torch.testing.assert_close(q, norm(made["q_latent"], (24,), made["q_weight"], 1e-3))
    torch.testing.assert_close(kv[..., :9], norm(made["kv"][..., :9], (9,), made["kv_weight"], 1e-3))
    raw = latents(dtype=torch.float64, L=9, norms=(False, False))
    q, kv = mla_latents(**raw, kernel="reference")
    assert q is raw["q_latent"] and torch.equal(kv[..., :9], raw["kv"][..., :9])


def test_scores_depend_on_distance_not_on_the_pairs_order():
    made = queries(B=1, H=1, Dn=4, Dr=8, packed=True, dtype=torch.float64)
    (q, cos, sin, _), kv = made.values(), latents(B=1, L=4, Dr=8, norms=(False, False), dtype=torch.float64)["kv"]
    order = torch.cat((torch.arange(4), 4 + torch.arange(8).view(4, 2).T.flatten()))  # halves, not neighbours

    def scores(q, kv, offset, interleaved):
        positions = torch.arange(17, dtype=torch.int32) + offset
        options = dict(cos=cos, sin=sin, positions=positions, interleaved=interleaved)
        return mla_queries(q, **options).squeeze(2) @ mla_latents(None, kv, **options)[1].mT

    torch.testing.assert_close(scores(q, kv, 0, True), scores(q, kv, 19, True), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores(q, kv, 0, True), scores(q[..., order], kv[..., order], 0, False))


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_of_the_definitions(interleaved):
    for packed in (False, True):
        for made in (queries(S=3, H=2, Dn=3, Dr=4, packed=packed), queries(S=3, H=2, Dn=3, Dr=4, L=2, packed=packed)):
            q, up = (made.get(name) for name in ("q", "up"))
            rest = {name: t for name, t in made.items() if name not in ("q", "up")}
            leaves = [t.detach().double().requires_grad_() for t in (q, up) if t is not None]
            turn = partial(mla_queries, **rest, interleaved=interleaved)
            assert torch.autograd.gradcheck(lambda q, up=None: turn(q, up=up), leaves)
        made = latents(S=3, Lq=3, L=2, Dr=4, packed=packed, dtype=torch.float64)
        names = [name for name, t in made.items() if t.requires_grad]
        rest = {name: t for name, t in made.items() if name not in names}

        def run(*leaves):
            return mla_latents(**dict(zip(names, leaves)), **rest, eps=0.1, interleaved=interleaved)

        assert torch.autograd.gradcheck(run, [made[name] for name in names])


# Triton, interpreted; its interpreter truncates to bf16, so that is left to the GPU

SHAPES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "S": st.integers(1, 9),
        "Dr": st.integers(1, 9).map(lambda half: 2 * half),
        "packed": st.booleans(),
        "first": st.booleans(),
        "dtype": st.sampled_from([torch.float16, torch.float32]),
        "seed": st.integers(0, 99),
    }
)
INTERPRETED = settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draws(make, shape, tokens, **options):
    """As many as make so many tokens: the rounding of a few elements says little."""
    count = -(-tokens // (shape["B"] * shape["S"]))
    return [make(**options, **shape | {"seed": 100 * shape["seed"] + more}) for more in range(count)]


@INTERPRETED
@given(SHAPES, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_queries(interpreter, shape, H, Dn, interleaved):
    made = draws(queries, shape, 16, H=H, Dn=Dn)
    run, definition = (partial(f, interleaved=interleaved) for f in (QUERIES, rope_reference.mla_queries))
    agree(run, definition, made)
    out = run(**made[0])
    assert out.is_contiguous() and out.dtype == shape["dtype"]


@pytest.mark.parametrize(
    "shape, interleaved",
    [
        ({"B": 1, "S": 1, "H": 1, "L": 16}, True),
        ({"B": 1, "S": 65, "H": 5, "Dn": 48, "L": 80, "first": True}, True),  # tiles of K, N, tokens and heads
        ({"B": 2, "H": 2, "Dn": 48, "L": 32, "packed": True}, False),
        ({"B": 2, "S": 260, "H": 1, "L": 16, "packed": True}, True),  # the tokens are split
    ],
    ids=str,
)
def test_queries_absorb(interpreter, shape, interleaved):
    made = queries(**shape)
    agree(partial(QUERIES, interleaved=interleaved), partial(rope_reference.mla_queries, interleaved=interleaved), made)
    assert QUERIES(**made).is_contiguous()


def test_queries_absorb_on_the_cpu_in_tiles_of_half(interpreter, monkeypatch):
    """The tiles and splits of 16-bit types, on fp32."""
    blocks = rope_triton._products
    monkeypatch.setattr(rope_triton, "_products", lambda K, N, _: blocks(K, N, torch.bfloat16))
    for shape in ({"S": 130, "H": 1, "Dn": 16, "L": 144}, {"S": 66, "H": 1, "Dn": 64, "L": 64}):
        agree(QUERIES, rope_reference.mla_queries, queries(B=1, **shape))


@INTERPRETED
@given(SHAPES, st.integers(2, 40), st.integers(1, 40), *[st.booleans()] * 5)
def test_latents(interpreter, shape, Lq, L, q, q_norm, kv_norm, wide, interleaved):
    """Both norms, one or none of them, no q, no latent; weights in fp32, too."""
    options = {"q": q, "norms": (q_norm, kv_norm), "weights": torch.float32 if wide else None}
    made = draws(latents, shape, 32, Lq=Lq, L=L if kv_norm else L - 1, **options)
    run, definition = (partial(f, interleaved=interleaved, eps=0.1) for f in (LATENTS, rope_reference.mla_latents))
    agree(run, definition, made)
    _, kv = run(**made[0])
    assert kv.is_contiguous() and kv.dtype == shape["dtype"]


@pytest.mark.parametrize("make", [queries, latents])
def test_bfloat16(interpreter, make):
    run, definition = {queries: (QUERIES, rope_reference.mla_queries), latents: (LATENTS, rope_reference.mla_latents)}[
        make
    ]
    agree(run, definition, make(dtype=torch.bfloat16), factor=4)


def test_latents_add_up_over_many_tiles(interpreter, monkeypatch):
    monkeypatch.setattr(rope_triton, "_PROGRAMS", 3)
    agree(LATENTS, rope_reference.mla_latents, latents(B=3, S=85, Lq=33, L=150, first=True))


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(interpreter, name):
    for run, made in (
        (mla_queries, queries(S=5)),
        (mla_queries, queries(S=5, L=16)),
        (mla_latents, latents(S=5)),
        (mla_latents, latents(S=5, packed=True)),
    ):
        run, want = partial(run, kernel=name), None
        want = bits(run, made)
        for change in (every_other, sequence_first):
            strided = {n: t if t is None else change(t).requires_grad_(t.requires_grad) for n, t in made.items()}
            torch.testing.assert_close(bits(run, strided), want, rtol=1e-6, atol=1e-6)


def every_other(t):
    """The same values, first dimension innermost, with gaps."""
    fill = torch.nan if t.is_floating_point() else -1
    wide = t.detach().new_full((*reversed(t.shape), 2), fill)
    return wide[..., 0].permute(*reversed(range(t.ndim))).copy_(t.detach())


def sequence_first(t):
    return t.detach().transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 2 else t.detach()


def test_gradients_lie_as_megatrons_activations(interpreter):
    """So that a view of [S, B, …], from a linear layer, needs no copy in its backward."""
    made = queries(first=True) | {"up": queries(L=16)["up"]}
    d_q = torch.autograd.grad(QUERIES(**made).sum(), made["q"])[0]
    assert d_q.stride() == made["q"].stride()
    made = latents(first=True)
    gradients = torch.autograd.grad([t.sum() for t in LATENTS(**made)], [made["q_latent"], made["kv"]])
    assert [g.stride() for g in gradients] == [made[name].stride() for name in ("q_latent", "kv")]


def test_what_is_frozen_gets_no_gradient(interpreter):
    made = queries(S=5, L=16)
    frozen = made | {"up": made["up"].detach()}
    assert_same(bits(QUERIES, frozen), bits(QUERIES, made)[:2])
    made = latents(S=5)
    for name in ("q_latent", "kv", "q_weight", "kv_weight"):
        frozen = made | {name: made[name].detach()}
        got, want = (outputs_and_gradients(LATENTS, m, None)[1] for m in (frozen, made))
        left = [value for key, value in want.items() if key.split(":")[1] != name]
        assert_same(list(got.values()), left)
    with torch.no_grad():
        assert not QUERIES(**queries(S=5, L=16)).requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", [{"B": 0}, {"S": 0}], ids=str)
def test_nothing_in_nothing_out(interpreter, name, empty):
    for run, made in (
        (mla_queries, queries(**empty)),
        (mla_queries, queries(L=32, **empty)),
        (mla_latents, latents(**empty)),
    ):
        outputs, gradients = outputs_and_gradients(partial(run, kernel=name), made, None)
        assert not any(t.numel() for t in outputs)
        for key, gradient in gradients.items():
            assert gradient.shape == made[key.split(":")[1]].shape and not gradient.any()


@pytest.mark.parametrize("wrong", [-1, 17, 2**31 - 1])
def test_a_position_outside_the_tables_is_nan(interpreter, wrong):
    """The public operators refuse it on a CPU; what runs on CUDA can't."""
    positions = torch.arange(17, dtype=torch.int32)
    positions[3] = wrong
    for made in (queries(), queries(L=16)):
        out = rope_triton.mla_queries(**made, positions=positions)
        assert out[..., -16:].isnan().flatten(2).any(2).sum(1).tolist() == [1, 1]
        assert out[:, 3, :, -16:].isnan().all() and not out[..., :-16].isnan().any()
    _, kv = rope_triton.mla_latents(**latents(), positions=positions)
    assert kv[:, 3, -8:].isnan().all() and kv.isnan().sum() == 2 * 8


@pytest.mark.parametrize("up", [None, 32])
def test_same_bits_in_one_graph(interpreter, up):
    made = queries(S=3, H=2, L=up, first=True)
    same_bits(QUERIES, made, times=2)
    operands = [made["q"], made["cos"], made["sin"], made.get("up"), None, True]
    torch.library.opcheck(torch.ops.nam56r.mla_queries.default, operands)
    d_out = QUERIES(**made).detach()
    kept = None if up is None else made["q"].detach()
    backward = [d_out, kept, *(t if t is None else t.detach() for t in operands[1:4]), None, True, True]
    torch.library.opcheck(torch.ops.nam56r.mla_queries_backward.default, backward)
    compiles(QUERIES, made)


@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, False)])
def test_latents_same_bits_in_one_graph(interpreter, norms):
    made = latents(S=3, norms=norms, packed=True, first=True)
    same_bits(LATENTS, made, times=2)
    if norms[0]:
        names = ("q_latent", "kv", "cos", "sin", "q_weight", "kv_weight")
        operands = [*map(made.get, names), 1e-6, made["positions"], True]
        torch.library.opcheck(torch.ops.nam56r.mla_latents.default, operands)
        tensors = [t if t is None else t.detach() for t in operands[:6]]
        gradients = [t.detach() for t in LATENTS(**made)]
        backward = [*gradients, *tensors, 1e-6, made["positions"], True, True, False]
        torch.library.opcheck(torch.ops.nam56r.mla_latents_backward.default, backward)
    compiles(LATENTS, made)


def compiles(run, made, **options):
    torch._dynamo.reset()
    options = options or {"backend": "aot_eager"}
    assert_same(bits(torch.compile(run, fullgraph=True, **options), made), bits(run, made))


# refusals


QUERY, LATENT = queries(L=16), latents()


@pytest.mark.parametrize(
    "run, changed, error, message",
    [
        (
            mla_queries,
            {"q": torch.zeros(2, 17, 32)},
            ValueError,
            r"q is \[2, 17, 32\], but must be \[B, S, H, Dn\+Dr\]",
        ),
        (mla_queries, {"up": torch.zeros(3, 15, 16)}, ValueError, r"up is \[3, 15, 16\], but must be \[H=3, Dn=16"),
        (mla_queries, {"up": torch.zeros(3, 16, 16).half()}, TypeError, "up is float16, but must be float32"),
        (mla_queries, {"sin": torch.zeros(17, 7)}, ValueError, r"sin is \[17, 7\], but must be \[P=17, Dr/2=8\]"),
        (mla_queries, {"cos": torch.zeros(17, 8).double()}, TypeError, "cos is float64, but must be float32"),
        (
            mla_queries,
            {"cos": torch.zeros(17, 17), "sin": torch.zeros(17, 17)},
            ValueError,
            r"cos turns Dr = 34 features, but must be from 2 to Dn\+Dr = 32",
        ),
        (mla_queries, {"cos": torch.zeros(17, 0), "sin": torch.zeros(17, 0)}, ValueError, "cos turns Dr = 0 features"),
        (
            mla_queries,
            {"cos": torch.zeros(16, 8), "sin": torch.zeros(16, 8)},
            ValueError,
            "cos has P = 16 rows, but S = 17 tokens need as many: make the tables longer, or give positions",
        ),
        (mla_queries, {"positions": torch.arange(17)}, TypeError, "positions is int64, but must be int32"),
        (mla_queries, {"positions": torch.arange(16).int()}, ValueError, r"positions is \[16\], but must be \[S=17\]"),
        (
            mla_queries,
            {"positions": torch.arange(1, 18).int()},
            ValueError,
            r"positions has 17, but must be in 0 … P − 1 = 16",
        ),
        (mla_queries, {"interleaved": "yes"}, ValueError, "interleaved is 'yes', but must be one of True, False"),
        (mla_queries, {"kernel": "cuda"}, ValueError, "has no kernel 'cuda': one of triton, reference"),
        (mla_queries, {"kernel": "triton"}, NoKernel, "but the device is cpu: set TRITON_INTERPRET=1"),
        (mla_latents, {"q_latent": torch.zeros(2, 16, 24)}, ValueError, r"q_latent is \[2, 16, 24\].*S=17"),
        (mla_latents, {"q_latent": torch.zeros(2, 17, 24).half()}, TypeError, "q_latent is float16"),
        (mla_latents, {"q_latent": None}, ValueError, "q_weight is given, but q_latent is None: give both, or only"),
        (mla_latents, {"kv_weight": torch.zeros(28)}, ValueError, r"kv_weight is \[28\], but must be \[L=20\]"),
        (mla_latents, {"q_weight": torch.zeros(24).half()}, TypeError, "q_weight is float16, but must be float32"),
        (mla_latents, {"eps": -1}, ValueError, "eps is -1, but must be a number of at least 0"),
    ],
)
def test_bad_input(run, changed, error, message):
    with pytest.raises(error, match=f"^{run.__name__}.*{message}"):
        run(**(QUERY if run is mla_queries else LATENT) | changed)


def problem(operator, device, dtype=torch.bfloat16, **shapes):
    """A planned problem: shapes of tensors by name, tables of Dr / 2 columns."""
    specs = {name: shape and Spec(shape, torch.float32 if name == "cos" else dtype) for name, shape in shapes.items()}
    return Problem.of(operator, device, **specs, positions=None, interleaved=True)


RECIPE = {"q": (2, 4096, 32, 128), "cos": (4096, 32)}
DOWN = {"kv": (2, 4096, 128), "q_latent": (2, 4096, 64), "cos": (4096, 32), "q_weight": (64,), "kv_weight": (64,)}


def test_planned_on_a_gpu():
    for up in (None, (32, 64, 64)):
        assert select(problem("mla_queries", DEVICES["h200"], **RECIPE, up=up)).name == "triton"
    assert select(problem("mla_latents", DEVICES["h200"], **DOWN)).name == "triton"
    for operator, shapes in (("mla_queries", RECIPE | {"up": None}), ("mla_latents", DOWN)):
        assert select(problem(operator, DEVICES["cpu"], **shapes)).name == "reference"


def test_refused():
    """Every reason at once."""
    old = Device("t4", "cuda", (7, 5))
    shapes = {"q": (1, 8, 2, 70), "cos": (8, 5), "up": (2, 60, 1040)}
    assert candidates("mla_queries")[0].refuses(problem("mla_queries", old, torch.float64, **shapes)) == (
        "t4 is sm_75, but it takes sm_80 or later",
        "q is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "Dn = 60, but with up the Triton kernel takes multiples of 16 up to 1024",
        "L = 1040, but with up the Triton kernel takes multiples of 16 up to 1024",
        "Dr = 10, but with up the Triton kernel takes multiples of 16 up to 1024",
    )
    shapes = {"q": (1, 8, 2, 4098), "cos": (8, 5), "up": None}
    assert candidates("mla_queries")[0].refuses(problem("mla_queries", DEVICES["h200"], **shapes)) == (
        "Dn + Dr = 4098, but the Triton kernel takes up to 4096",
    )
    shapes = {"kv": (1, 8, 8194), "q_latent": (1, 8, 8193), "cos": (8, 5), "q_weight": (8193,), "kv_weight": None}
    assert candidates("mla_latents")[0].refuses(problem("mla_latents", old, torch.float64, **shapes)) == (
        "t4 is sm_75, but it takes sm_80 or later",
        "kv is torch.float64, but the Triton kernel takes bfloat16, float16 or float32",
        "L + Dr = 8194, but the Triton kernel takes up to 8192",
        "Lq = 8193, but the Triton kernel takes up to 8192",
    )


# on a GPU


GPU_QUERIES = [
    {"B": 2, "S": 300, "H": 32, "Dn": 64, "Dr": 64},
    {"B": 1, "S": 301, "H": 32, "Dn": 64, "Dr": 64, "packed": True},
    {"B": 2, "S": 100, "H": 128, "Dn": 128, "Dr": 64},
    {"B": 1, "S": 1, "H": 1, "Dn": 0, "Dr": 2},
    {"B": 3, "S": 67, "H": 51, "Dn": 50, "Dr": 34, "packed": True},
    {"B": 1, "S": 5, "H": 2, "Dn": 4000, "Dr": 96},
]
GPU_ABSORBED = [
    {"B": 2, "S": 300, "H": 32, "Dn": 64, "Dr": 64, "L": 64},
    {"B": 1, "S": 301, "H": 32, "Dn": 64, "Dr": 64, "L": 64, "packed": True},
    {"B": 2, "S": 131, "H": 128, "Dn": 128, "Dr": 64, "L": 512},
    {"B": 1, "S": 1, "H": 1, "Dn": 16, "Dr": 16, "L": 16},
    {"B": 3, "S": 67, "H": 5, "Dn": 48, "Dr": 80, "L": 208},
    {"B": 2, "S": 2000, "H": 3, "Dn": 32, "Dr": 16, "L": 16, "packed": True},
    {"B": 1, "S": 65, "H": 2, "Dn": 1024, "Dr": 16, "L": 1024},
]
GPU_LATENTS = [
    {"B": 2, "S": 300, "Lq": 64, "L": 64, "Dr": 64},
    {"B": 1, "S": 301, "Lq": 64, "L": 64, "Dr": 64, "packed": True},
    {"B": 2, "S": 700, "Lq": 1536, "L": 512, "Dr": 64},
    {"B": 1, "S": 1, "Lq": 1, "L": 1, "Dr": 2},
    {"B": 3, "S": 67, "Lq": 777, "L": 51, "Dr": 34, "packed": True},
    {"B": 1, "S": 9, "Lq": 8192, "L": 8128, "Dr": 64},
]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*GPU_QUERIES, *GPU_ABSORBED], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_gpu_queries(interleaved, shape, dtype, poisoned):
    run, definition = (partial(f, interleaved=interleaved) for f in (QUERIES, rope_reference.mla_queries))
    for first in (True, False):
        made = [queries(**shape, first=first, dtype=dtype, device="cuda", seed=seed) for seed in range(2)]
        agree(run, definition, made)
        same_bits(run, made[0])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_LATENTS, ids=str)
@pytest.mark.parametrize("norms", [(True, True), (False, True), (True, False), (False, False)])
def test_gpu_latents(norms, shape, dtype, poisoned):
    for interleaved in (True, False):
        run, definition = (partial(f, interleaved=interleaved) for f in (LATENTS, rope_reference.mla_latents))
        options = shape | {"norms": norms, "first": interleaved, "weights": torch.float32 if interleaved else None}
        made = [latents(**options, dtype=dtype, device="cuda", seed=seed) for seed in range(4)]
        agree(run, definition, made)
        same_bits(run, made[0])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_gpu_replays_and_compiles(packed, dtype):
    for run, make, shape in (
        (QUERIES, queries, GPU_QUERIES[0]),
        (QUERIES, queries, GPU_ABSORBED[0]),
        (LATENTS, latents, GPU_LATENTS[0]),
    ):
        shape = shape | {"packed": packed, "dtype": dtype, "device": "cuda"}
        replays(run, lambda seed: make(**shape, seed=seed))
        compiles(run, make(**shape), backend="inductor")


@gpu
def test_gpu_positions_without_waiting():
    """In a graph, for other bounds of as many sequences."""
    bounds = torch.tensor(PACKED, dtype=torch.int32, device="cuda")
    positions_of(bounds, 17)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions = positions_of(bounds, 17)
    other = torch.tensor([0, 0, 9, 10, 10, 17], dtype=torch.int32)
    bounds.copy_(other)
    graph.replay()
    assert torch.equal(positions.cpu(), positions_of(other, 17))


@gpu
@pytest.mark.parametrize("L", [None, 128])
def test_gpu_beyond_32_bit_offsets(L):
    """Queries of more than 2^31 elements: the last token, and its gradient, as one alone."""
    H, Dn, Dr = 128, 128, 64
    S = 2**31 // (H * (Dn + Dr)) + 2
    one = queries(1, 1, H, Dn, Dr, L, dtype=torch.bfloat16, device="cuda")
    cos, sin = rope_tables(1, Dr, 500.0, device="cuda")
    one |= {"cos": cos, "sin": sin}
    many = one | {"q": torch.zeros(1, S, H, Dn + Dr, dtype=torch.bfloat16, device="cuda")}
    many["q"][:, -1:] = one["q"].detach()
    many["q"].requires_grad_()
    many["positions"] = torch.zeros(S, dtype=torch.int32, device="cuda")
    out, want = QUERIES(**many), QUERIES(**one)
    assert torch.equal(out[:, -1:], want)
    d_out = torch.zeros_like(out)
    d_out[:, -1:] = want.detach()
    leaves = ["q", "up"] if L else ["q"]
    got = torch.autograd.grad(out, [many[name] for name in leaves], d_out)
    alone = torch.autograd.grad(want, [one[name] for name in leaves], want.detach())
    assert torch.equal(got[0][:, -1:], alone[0])
    assert not L or torch.equal(got[1], alone[1])


@gpu
def test_gpu_latents_beyond_32_bit_offsets():
    Lq, L, Dr = 2048, 512, 64
    S = 2**31 // Lq + 2
    one = latents(1, 1, Lq, L, Dr, dtype=torch.bfloat16, device="cuda")
    cos, sin = rope_tables(1, Dr, 500.0, device="cuda")
    one |= {"cos": cos, "sin": sin}
    many = one | {"positions": torch.zeros(S, dtype=torch.int32, device="cuda")}
    for name in ("q_latent", "kv"):
        many[name] = torch.zeros(1, S, one[name].shape[2], dtype=torch.bfloat16, device="cuda")
        many[name][:, -1:] = one[name].detach()
        many[name].requires_grad_()
    out, want = LATENTS(**many), LATENTS(**one)
    assert_same([t[:, -1:] for t in out], want)
    leaves = ["q_latent", "kv", "q_weight", "kv_weight"]
    d_out = [torch.zeros_like(t) for t in out]
    for d, t in zip(d_out, want):
        d[:, -1:] = t.detach()
    got = torch.autograd.grad(out, [many[name] for name in leaves], d_out)
    alone = torch.autograd.grad(want, [one[name] for name in leaves], [t.detach() for t in want])
    assert_same([*(t[:, -1:] for t in got[:2]), *got[2:]], alone)
