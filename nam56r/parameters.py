"""Parameter counts from the recipe alone: the shape of every parameter of every block, by the name it has in a module.

The A and E blocks have Megatron's own layouts. Linears have no bias and are [out, in].
"""

from __future__ import annotations

import math

from nam56r.recipe import Recipe, Role

Shapes = dict[str, tuple[int, ...]]
FAMILIES = ("attention", "moe", "mamba", "m2rnn", "mtp", "embedding", "head", "norm")
FAMILY = {"mla": "attention", "dsa": "attention", "moe": "moe", "mamba3": "mamba", "mamba2": "mamba", "m2rnn": "m2rnn"}
MAMBA2_CONV = 4  # the width of Megatron's MambaMixer


def mla(recipe: Recipe) -> Shapes:
    """Dense MLA, as Megatron's MLASelfAttention."""
    a, d = recipe.mla, recipe.hidden_size
    return {
        "linear_q_down_proj": (a.q_lora_rank, d),
        "q_layernorm": (a.q_lora_rank,),
        "linear_q_up_proj": (a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.q_lora_rank),
        "linear_kv_down_proj": (a.kv_lora_rank + a.qk_rope_head_dim, d),
        "kv_layernorm": (a.kv_lora_rank,),
        "linear_kv_up_proj": (a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank),
        "linear_proj": (d, a.num_heads * a.v_head_dim),
    }


def indexer(recipe: Recipe) -> Shapes:
    """What a sparse layer with its own indices has besides MLA, as Megatron's DSAIndexer (k_norm is a LayerNorm)."""
    s, d = recipe.dsa, recipe.hidden_size
    return {
        "linear_wq_b": (s.index_num_heads * s.index_head_dim, recipe.mla.q_lora_rank),
        "linear_wk": (s.index_head_dim, d),
        "k_norm.weight": (s.index_head_dim,),
        "k_norm.bias": (s.index_head_dim,),
        "linear_weights_proj": (s.index_num_heads, d),
    }


def moe(recipe: Recipe) -> Shapes:
    """Router, routed experts and the shared SwiGLU expert. The router's expert bias is a buffer and isn't here."""
    e, d = recipe.moe, recipe.hidden_size
    return {
        "router": (e.num_experts, d),
        "w_up": (e.num_experts, e.ffn_hidden_size, d),
        "w_down": (e.num_experts, d, e.ffn_hidden_size),
        "shared_fc1": (2 * e.shared_ffn_hidden_size, d),
        "shared_fc2": (d, e.shared_ffn_hidden_size),
    }


def mamba3(recipe: Recipe) -> Shapes:
    """Mamba-3: in_proj gives z, x, B, C, dt, A, trap and the angles that all heads share."""
    m, h, d = recipe.mamba, recipe.mamba_heads, recipe.hidden_size
    inner, rank, n = h * m.headdim, m.mimo_rank, m.d_state
    shapes: Shapes = {
        "in_proj": (2 * inner + 2 * rank * m.ngroups * n + 3 * h + n // 4, d),
        "B_norm": (n,),
        "C_norm": (n,),
        "dt_bias": (h,),
        "B_bias": (h, rank, n),
        "C_bias": (h, rank, n),
        "D": (h,),
        "out_proj": (d, inner),
    }
    if rank > 1:
        shapes |= {name: (h, rank, m.headdim) for name in ("mimo_psi", "mimo_zeta", "mimo_phi")}
    return shapes


def mamba2(recipe: Recipe) -> Shapes:
    """Mamba-2, as Megatron's MambaMixer."""
    m, h, d = recipe.mamba, recipe.mamba_heads, recipe.hidden_size
    inner, mixed = h * m.headdim, h * m.headdim + 2 * m.ngroups * m.d_state
    return {
        "in_proj": (inner + mixed + h, d),
        "conv1d_weight": (mixed, MAMBA2_CONV),
        "conv1d_bias": (mixed,),
        "A_log": (h,),
        "D": (h,),
        "dt_bias": (h,),
        "norm": (inner,),
        "out_proj": (d, inner),
    }


def m2rnn(recipe: Recipe) -> Shapes:
    """M²RNN: in_proj gives q, k (one head each), v, f and g."""
    r, d = recipe.m2rnn, recipe.hidden_size
    n, v = r.num_heads, r.v_head_dim
    mixed = 2 * r.k_head_dim + n * v
    return {
        "in_proj": (mixed + n + n * v, d),
        "conv": (mixed, r.conv_width),
        "A_log": (n,),
        "dt_bias": (n,),
        "W": (n, v, v),
        "D": (n,),
        "norm": (n * v,),
        "out_proj": (d, n * v),
    }


def mtp(recipe: Recipe) -> Shapes:
    """One MTP depth: the two norms and the projection around a dense MLA block and a dense SwiGLU block."""
    d, ffn = recipe.hidden_size, recipe.ffn_hidden_size
    return {
        "enorm": (d,),
        "hnorm": (d,),
        "eh_proj": (d, 2 * d),
        "input_layernorm": (d,),
        **mla(recipe),
        "pre_mlp_layernorm": (d,),
        "fc1": (2 * ffn, d),
        "fc2": (d, ffn),
        "final_layernorm": (d,),
    }


def layer(recipe: Recipe, number: int) -> Shapes:
    """The parameters of one layer, without its input norm. number counts from 1."""
    role: Role = recipe.roles[number - 1]
    if role == "dsa":
        return mla(recipe) | (indexer(recipe) if number in recipe.indexer_layers else {})
    return {"mla": mla, "moe": moe, "mamba3": mamba3, "mamba2": mamba2, "m2rnn": m2rnn}[role](recipe)


def size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def parameters(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(total, active) parameters by family; every family is there, zero where the recipe has none.

    Active is what one token meets: of the routed experts top_k, of the embedding its one row. Input norms and the
    final norm are counted under "norm"; an MTP depth's own norms under "mtp".
    """
    d, e = recipe.hidden_size, recipe.moe
    counts = dict.fromkeys(FAMILIES, (0, 0))
    for number, role in enumerate(recipe.roles, 1):
        shapes = layer(recipe, number)
        total = size(shapes)
        idle = max(e.num_experts - e.top_k, 0) * 2 * e.ffn_hidden_size * d if role == "moe" else 0
        before = counts[FAMILY[role]]
        counts[FAMILY[role]] = (before[0] + total, before[1] + total - idle)
    depths = recipe.mtp.num_depths * size(mtp(recipe))
    norms = (recipe.depth + 1) * d
    vocabulary = recipe.vocab_size * d
    return counts | {
        "mtp": (depths, depths),
        "embedding": (vocabulary, d),
        "head": (vocabulary, vocabulary),
        "norm": (norms, norms),
    }
