"""Hypothesis strategies for recipes: any that `Recipe` takes, small enough to be quick."""

from __future__ import annotations

from hypothesis import strategies as st

from nam56r.recipe import DSA, M2RNN, MLA, MTP, Mamba, MoE, Recipe

small = st.integers(1, 9)
coefficients = st.floats(0, 10, allow_nan=False)
positive = st.floats(1e-12, 10, allow_nan=False)


@st.composite
def recipes(draw: st.DrawFn, symbols: str = "AEMR") -> Recipe:
    """A valid recipe of these symbols, every value drawn. Faults of its translation are possible: shared indices,
    a rope_theta that is no whole number."""
    depth = draw(st.integers(1, 14))
    pattern = draw(st.text(symbols, min_size=1, max_size=12))
    attention = (pattern * depth)[:depth].count("A")
    ranks = draw(st.sets(st.integers(0, attention - 1))) if attention else set()
    rope = 2 * draw(small)
    headdim, ngroups, expand = draw(small), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = ngroups * draw(st.integers(1, 4))
    experts = draw(st.integers(1, 16))
    return Recipe(
        name=draw(st.sampled_from(["any", "ein Rezept"])),
        pattern=pattern,
        depth=depth,
        # a multiple of what makes expand · hidden / headdim the drawn heads
        hidden_size=headdim * heads,
        ffn_hidden_size=draw(st.integers(1, 999)),
        vocab_size=draw(st.integers(2, 200_000)),
        seq_length=draw(st.integers(8, 70_000)),
        norm_eps=draw(positive),
        init_std=draw(positive),
        mla=MLA(
            num_heads=draw(small),
            q_lora_rank=draw(small),
            kv_lora_rank=draw(small),
            qk_nope_head_dim=draw(small),
            qk_rope_head_dim=rope,
            v_head_dim=draw(small),
            rope_theta=draw(st.integers(1, 10**9).map(float) | positive),
        ),
        dsa=DSA(
            ranks=tuple(sorted(ranks)),
            index_num_heads=draw(small),
            index_head_dim=rope + draw(st.integers(0, 9)),
            top_k=draw(small),
            loss_coeff=draw(coefficients),
            share_every=draw(st.sampled_from([1, 1, 1, 2])),
        ),
        mamba=Mamba(
            kind=draw(st.sampled_from(["mamba3", "mamba3", "mamba2"])),
            headdim=headdim,
            expand=expand,
            d_state=4 * draw(small),
            ngroups=ngroups,
            mimo_rank=draw(st.integers(1, 4)),
        ),
        moe=MoE(
            num_experts=experts,
            top_k=draw(st.integers(1, experts)),
            ffn_hidden_size=draw(st.integers(1, 999)),
            shared_ffn_hidden_size=draw(st.integers(1, 999)),
            aux_loss_coeff=draw(coefficients),
        ),
        m2rnn=M2RNN(
            k_head_dim=draw(small), v_head_dim=draw(small), num_heads=draw(small), conv_width=draw(st.integers(2, 4))
        ),
        mtp=MTP(num_depths=draw(st.integers(0, 3)), loss_coeff=draw(coefficients)),
    )
