"""FLOPs per token of each slot, from formulas.

Convention: model FLOPs. Two for each multiply-add that the mathematics needs, averaged over the tokens of one
sequence; nothing for recomputation, for masked-out work, for padding, for communication, or for pointwise work (norms,
activations, rotations, gates, softmax). Backward is twice forward, since each product has two gradients; the exception
is the DSA indexer, whose inputs are detached.

Causal attention: token t sees t keys, (S + 1) / 2 on average. DSA: min(t, top_k) keys, averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nam56r import parameters
from nam56r.recipe import MLA, Recipe


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def products(forward: float) -> Flops:
    """Products of which both sides get a gradient."""
    return Flops(forward, 2 * forward)


def total(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops(0, 0))


def causal_keys(seq_length: int) -> float:
    """Keys that a token sees, on average."""
    return (seq_length + 1) / 2


def selected_keys(seq_length: int, top_k: int) -> float:
    """min(t, top_k), averaged over t = 1 … seq_length."""
    rising = min(seq_length, top_k)
    return (rising * (rising + 1) / 2 + (seq_length - rising) * top_k) / seq_length


def mla_score(mla: MLA) -> dict[str, int]:
    """What one head's query takes with one key, score and value, by form of attention.

    Absorbed: the score is over latent and rope, the value is the latent. Expanded: over nope and rope, and v. The
    projections around them take the same for a token.
    """
    return {
        "absorbed": 2 * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim),
        "expanded": 2 * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim),
    }


def mla(recipe: Recipe) -> Flops:
    """Projections, and attention in the form that takes less."""
    per_key = recipe.mla.num_heads * min(mla_score(recipe.mla).values())
    return products(_linears(parameters.mla(recipe)) + per_key * causal_keys(recipe.seq_length))


def dsa(recipe: Recipe, *, indexer: bool = True) -> Flops:
    """Absorbed attention over the selected keys, and the indexer over the causal half where the layer has one.

    Absorbing multiplies each query by its head's part of linear_kv_up_proj and each latent output by the other part:
    as many products as expanding one token's keys and values. Scores are over the latent and the rope part, values
    over the latent. An index score takes a product over index_head_dim and a weight, for each index head. The indexer's
    backward has weight gradients only (its inputs are detached) and runs over the selected keys (the loss's).
    """
    a, s = recipe.mla, recipe.dsa
    selected = selected_keys(recipe.seq_length, s.top_k)
    per_key = 2 * a.num_heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim)
    attention = products(_linears(parameters.mla(recipe)) + per_key * selected)
    if not indexer:
        return attention
    linears = _linears(parameters.indexer(recipe))
    per_score = 2 * s.index_num_heads * (s.index_head_dim + 1)
    scores = Flops(per_score * causal_keys(recipe.seq_length), 2 * per_score * selected)
    return attention + Flops(linears, linears) + scores


def moe(recipe: Recipe) -> Flops:
    """Router, top_k routed experts, the shared expert."""
    e, shapes = recipe.moe, parameters.moe(recipe)
    routed = 2 * min(e.top_k, e.num_experts) * 2 * e.ffn_hidden_size * recipe.hidden_size
    return products(routed + _linears({k: v for k, v in shapes.items() if k not in ("w_up", "w_down")}))


def mamba3(recipe: Recipe) -> Flops:
    """Projections and the recurrence, counted step by step, not in chunks.

    For each head: the state's decay (P·N), one update of rank R (2·R·P·N: β_{t+1}/α_{t+1} and γ_t can share one outer
    product, since both scale v_t k̃_tᵀ) and R read-outs (2·R·P·N).
    """
    m = recipe.mamba
    state = recipe.mamba_heads * m.headdim * m.d_state
    return products(_linears(parameters.mamba3(recipe)) + state * (1 + 4 * m.mimo_rank))


def mamba2(recipe: Recipe) -> Flops:
    """Projections, convolution and the recurrence, step by step: decay (P·N), update and read-out (2·P·N each)."""
    m = recipe.mamba
    return products(_linears(parameters.mamba2(recipe)) + 5 * recipe.mamba_heads * m.headdim * m.d_state)


def m2rnn(recipe: Recipe) -> Flops:
    """Projections, convolution and the scan.

    For each head: H W (2·K·V²), + k vᵀ (2·K·V), the blend f H + (1 − f) Z (3·K·V), the read-out qᵀ H (2·K·V).
    """
    r = recipe.m2rnn
    scan = r.num_heads * r.k_head_dim * r.v_head_dim * (2 * r.v_head_dim + 7)
    return products(_linears(parameters.m2rnn(recipe)) + scan)


def head(recipe: Recipe) -> Flops:
    """The output projection to the vocabulary."""
    return products(2 * recipe.hidden_size * recipe.vocab_size)


def mtp(recipe: Recipe) -> Flops:
    """One MTP depth: projection, dense MLA, dense SwiGLU, and the main head's projection once more."""
    around = {name: shape for name, shape in parameters.mtp(recipe).items() if name in ("eh_proj", "fc1", "fc2")}
    return mla(recipe) + products(_linears(around)) + head(recipe)


def layer(recipe: Recipe, number: int) -> Flops:
    """One layer by its number, from 1."""
    role = recipe.roles[number - 1]
    if role == "dsa":
        return dsa(recipe, indexer=number in recipe.indexer_layers)
    return {"mla": mla, "moe": moe, "mamba3": mamba3, "mamba2": mamba2, "m2rnn": m2rnn}[role](recipe)


def model(recipe: Recipe) -> Flops:
    """The whole model: layers, head, MTP depths. Times tokens per second and over the device's rate, `total` is MFU."""
    layers = total(layer(recipe, number) for number in range(1, recipe.depth + 1))
    return layers + head(recipe) + mtp(recipe) * recipe.mtp.num_depths


def _linears(shapes: parameters.Shapes) -> float:
    """Two for each weight of the linears and convolutions, [out, in]; the rest is pointwise, or counted apart."""
    return 2 * sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)
