"""The FLOP formulas against counting, one token and one key at a time, and against what is published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nam56r import flops
from nam56r.parameters import parameters
from nam56r.recipe import PRESETS, Recipe

NAM56R = PRESETS["nam56r"]
SMALL = Recipe.load("nam56r-tiny").with_overrides(["seq_length=24", "dsa.top_k=7"])


@pytest.mark.parametrize(("length", "top_k"), [(1, 1), (1, 9), (9, 3), (9, 9), (9, 10), (300, 7)])
def test_keys_are_averaged_over_tokens(length, top_k):
    assert flops.causal_keys(length) == pytest.approx(sum(range(1, length + 1)) / length)
    assert flops.selected_keys(length, top_k) == pytest.approx(
        sum(min(t, top_k) for t in range(1, length + 1)) / length
    )


def counted(run, *inputs):
    """Forward and backward products of a module written in PyTorch, as PyTorch counts them."""
    with FlopCounterMode(display=False) as forward:
        out = run(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return flops.Flops(forward.get_total_flops(), backward.get_total_flops())


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def test_mla_is_what_its_products_take():
    """All S² keys here: masked-out work is counted by PyTorch, and not by the formula."""
    a, s, d = SMALL.mla, SMALL.seq_length, SMALL.hidden_size
    h, nope, rope, v = a.num_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim

    def run(x, q_down, q_up, kv_down, kv_up, proj):
        q = (x @ q_down @ q_up).view(s, h, nope + rope).transpose(0, 1)
        latent, k_rope = (x @ kv_down).split((a.kv_lora_rank, rope), -1)
        k, value = (latent @ kv_up).view(s, h, nope + v).transpose(0, 1).split((nope, v), -1)
        k = torch.cat((k, k_rope.expand(h, s, rope)), -1)
        return ((q @ k.mT).softmax(-1) @ value).transpose(0, 1).reshape(s, h * v) @ proj

    weights = (d, a.q_lora_rank), (a.q_lora_rank, h * (nope + rope)), (d, a.kv_lora_rank + rope)
    weights += (a.kv_lora_rank, h * (nope + v)), (h * v, d)
    found = counted(run, leaf(s, d), *(leaf(*w) for w in weights))
    masked = flops.products(2 * h * (nope + rope + v) * (s - flops.causal_keys(s)))
    wanted = (flops.mla(SMALL) + masked) * s
    assert (found.forward, found.backward) == (wanted.forward, wanted.backward)


def test_mla_is_absorbed_where_that_takes_less():
    """The same counting with the keys' weight at the queries and the values' weight behind."""
    recipe = SMALL.with_overrides(["mla.kv_lora_rank=16"])
    a, s, d = recipe.mla, recipe.seq_length, recipe.hidden_size
    h, nope, rope, v, latent = a.num_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank

    def run(x, q_down, q_up, kv_down, up, value_up, proj):
        q_nope, q_rope = (x @ q_down @ q_up).view(s, h, nope + rope).transpose(0, 1).split((nope, rope), -1)
        kv = (x @ kv_down).expand(h, s, latent + rope)
        out = (torch.cat((q_nope @ up, q_rope), -1) @ kv.mT).softmax(-1) @ kv[..., :latent]
        return (out @ value_up).transpose(0, 1).reshape(s, h * v) @ proj

    weights = (d, a.q_lora_rank), (a.q_lora_rank, h * (nope + rope)), (d, latent + rope)
    weights += (h, nope, latent), (h, latent, v), (h * v, d)
    found = counted(run, leaf(s, d), *(leaf(*w) for w in weights))
    masked = flops.products(h * flops.mla_score(a)["absorbed"] * (s - flops.causal_keys(s)))
    wanted = (flops.mla(recipe) + masked) * s
    assert (found.forward, found.backward) == (wanted.forward, wanted.backward)
    wide = SMALL.with_overrides(["mla.kv_lora_rank=64"]).mla
    assert min(flops.mla_score(wide), key=flops.mla_score(wide).get) == "expanded"


def test_the_indexer_has_weight_gradients_only():
    a, x, s, d = SMALL.mla, SMALL.dsa, SMALL.seq_length, SMALL.hidden_size

    def run(hidden, latent, wq, wk, ww):
        q = (latent @ wq).view(s, x.index_num_heads, x.index_head_dim)
        scores = (q @ (hidden @ wk).T).relu()  # [S, heads, S]
        return (hidden @ ww)[:, None] @ scores

    weights = (a.q_lora_rank, x.index_num_heads * x.index_head_dim), (d, x.index_head_dim), (d, x.index_num_heads)
    found = counted(run, torch.randn(s, d), torch.randn(s, a.q_lora_rank), *(leaf(*w) for w in weights))
    indexer = flops.dsa(SMALL) + flops.dsa(SMALL, indexer=False) * -1
    per_score = 2 * x.index_num_heads * (x.index_head_dim + 1)
    rest = s - flops.causal_keys(s), s - flops.selected_keys(s, x.top_k)  # keys the formula leaves out, PyTorch doesn't
    assert found.forward == pytest.approx((indexer.forward + per_score * rest[0]) * s)
    assert found.backward == pytest.approx((indexer.backward + 2 * per_score * rest[1]) * s)


def test_moe_is_what_its_products_take():
    e, d = SMALL.moe, SMALL.hidden_size

    def run(x, router, up, down, gate_up, shared_down):
        routed = sum((x @ u).relu().square() @ w for u, w in zip(up, down)) + (x @ router).sum(-1, keepdim=True)
        gate, value = (x @ gate_up).chunk(2, -1)
        return routed + (gate.sigmoid() * value) @ shared_down

    f, fs = e.ffn_hidden_size, e.shared_ffn_hidden_size
    chosen = [leaf(d, f) for _ in range(e.top_k)], [leaf(f, d) for _ in range(e.top_k)]
    found = counted(run, leaf(1, d), leaf(d, e.num_experts), *chosen, leaf(d, 2 * fs), leaf(fs, d))
    assert (found.forward, found.backward) == (flops.moe(SMALL).forward, flops.moe(SMALL).backward)


class Number:
    """Counts the products and sums that it takes part in."""

    operations = 0

    def __mul__(self, other):
        Number.operations += 1
        return self

    __add__ = __mul__


def steps(run):
    Number.operations = 0
    run()
    return Number.operations


def test_m2rnn_is_one_step_of_its_recurrence():
    r, n = SMALL.m2rnn, Number()
    keys, values = range(r.k_head_dim), range(r.v_head_dim)

    def step():
        for _ in keys:
            for _ in values:
                z = n * n  # k vᵀ
                for _ in values:
                    z = z + n * n  # H W
                h = n * n + n * z  # f H + (1 − f) tanh(Z)
                n + n * h  # qᵀ H

    linears = 2 * SMALL.hidden_size * ((32 + 32 + 48 + 3 + 48) + 48) + 2 * 4 * (32 + 32 + 48)
    found = linears + r.num_heads * steps(step)
    # the first sum of H W begins at k vᵀ, where the formula counts a sum of its own
    assert flops.m2rnn(SMALL).forward == found + r.num_heads * r.k_head_dim * r.v_head_dim


@pytest.mark.parametrize("rank", [1, 2])
def test_mamba3_is_one_step_of_its_recurrence(rank):
    recipe, n = SMALL.with_overrides([f"mamba.mimo_rank={rank}"]), Number()

    def step():
        for _ in range(recipe.mamba_heads * recipe.mamba.headdim * recipe.mamba.d_state):
            s = n * n  # α S
            for _ in range(rank):
                s = s + n * n  # weighed v kᵀ
            for _ in range(rank):
                n + s * n  # S q

    projections = 2 * recipe.hidden_size * (2 * 512 + 2 * rank * 2 * 32 + 3 * 8 + 8 + 512)
    assert flops.mamba3(recipe).forward == projections + steps(step)


def test_mamba2_takes_less_than_mamba3():
    stock = SMALL.with_overrides(["mamba.kind=mamba2"])
    assert flops.layer(stock, 3) == flops.mamba2(stock)
    assert flops.mamba2(stock).total < flops.mamba3(SMALL).total


def test_the_model_is_its_parts():
    parts = [flops.layer(NAM56R, number) for number in range(1, 53)]
    parts += [flops.head(NAM56R), flops.mtp(NAM56R), flops.mtp(NAM56R)]
    assert flops.model(NAM56R) == flops.total(parts)
    shared = NAM56R.with_overrides(["dsa.share_every=3"])
    assert flops.layer(shared, 5) == flops.layer(NAM56R, 5)
    assert flops.layer(shared, 9).total < flops.layer(NAM56R, 9).total


def test_agrees_with_what_is_published():
    """289 TFLOP/s at 9,250 tokens/s a GPU are 31.2 GFLOP a token; and 6 for each weight that a token meets."""
    total = flops.model(NAM56R).total
    assert total == pytest.approx(289e12 / 9250, rel=0.03)
    active = {family: active for family, (_, active) in parameters(NAM56R).items()}
    met = sum(active.values()) - active["embedding"] + 2 * active["head"]
    assert total == pytest.approx(6 * met, rel=0.08)
