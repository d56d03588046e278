"""Megatron's command-line flags for what a recipe says, and nothing else.

Parallel sizes, batch, precision, optimizer, data and everything that only changes speed belong to the launch policy.
A family that the model hasn't got has no flags, except the sizes that Megatron asks of every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nam56r.recipe import Recipe
from nam56r.records import Frozen
from nam56r.translate.contract import TranslationPlan, TranslationRefused, has_attention, index_sharing

DISPATCHERS = ("alltoall", "allgather", "flex")
Flag = tuple[str | int | float, ...]


class MegatronArgs(Frozen):
    """Words of a command line, and what they can't say."""

    args: tuple[str, ...]
    custom_notes: tuple[str, ...]

    @property
    def flags(self) -> tuple[tuple[str, ...], ...]:
        """The words grouped by flag: ("--swiglu",), ("--hidden-size", "4096"), …"""
        return tuple(by_flag(self.args))


def by_flag(words: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Words of a command line grouped by flag; those before the first flag are one group."""
    group: list[str] = []
    for word in words:
        if word.startswith("--") and group:
            yield tuple(group)
            group = []
        group.append(word)
    if group:
        yield tuple(group)


def megatron_args(recipe: Recipe, translation: TranslationPlan, *, dispatcher: str = "alltoall") -> MegatronArgs:
    """The flags of a translated recipe. Parsed by Megatron, each gives the recipe's value exactly.

    dispatcher  Megatron's name of how tokens reach experts; "allgather" on a CPU
    Raises TranslationRefused with every refusal, ValueError for another recipe's translation or an unknown dispatcher.
    """
    if (translation.recipe, tuple(slot.role for slot in translation.slots)) != (recipe.name, recipe.roles):
        raise ValueError(
            f"the translation is of {translation.recipe}, not of {recipe.name}: translate the recipe itself"
        )
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"dispatcher is {dispatcher!r}, but must be one of {', '.join(DISPATCHERS)}")
    if translation.refusals:
        raise TranslationRefused(translation)
    flags = (*_model(recipe, translation), *_attention(recipe), *_experts(recipe, dispatcher), *_mamba(recipe))
    words = tuple(_text(word) for flag in (*flags, *_mtp(recipe)) for word in flag)
    return MegatronArgs(args=words, custom_notes=translation.custom_notes)


def _text(value: str | int | float) -> str:
    """repr of a float reads back as the same float."""
    return value if isinstance(value, str) else repr(value)


def _model(recipe: Recipe, translation: TranslationPlan) -> Iterator[Flag]:
    if translation.stack_spec:
        # our layers need no Transformer Engine; --spec takes two words
        yield "--spec", *translation.stack_spec.split()
        yield "--transformer-impl", "local"
    yield "--hybrid-layer-pattern", translation.native_pattern
    yield "--num-layers", recipe.depth
    yield "--hidden-size", recipe.hidden_size
    yield "--ffn-hidden-size", recipe.ffn_hidden_size
    # Megatron asks every model for heads, and for channels where the heads don't divide the hidden size
    yield "--num-attention-heads", recipe.mla.num_heads
    yield "--kv-channels", recipe.hidden_size // recipe.mla.num_heads
    yield "--seq-length", recipe.seq_length
    yield "--max-position-embeddings", recipe.seq_length
    # the vocabulary as it is: --vocab-size would be padded to a multiple of 128 · TP
    yield "--padded-vocab-size", recipe.vocab_size
    yield ("--untie-embeddings-and-output-weights",)
    # a learned position for every token is Megatron's default
    yield "--position-embedding-type", "rope" if has_attention(recipe) else "none"
    yield "--normalization", "RMSNorm"
    yield "--norm-epsilon", recipe.norm_eps
    yield "--init-method-std", recipe.init_std
    yield ("--disable-bias-linear",)
    yield ("--swiglu",)
    yield "--hidden-dropout", 0.0
    yield "--attention-dropout", 0.0


def _attention(recipe: Recipe) -> Iterator[Flag]:
    mla, dsa = recipe.mla, recipe.dsa
    if not has_attention(recipe):
        return
    yield ("--multi-latent-attention",)
    yield "--q-lora-rank", mla.q_lora_rank
    yield "--kv-lora-rank", mla.kv_lora_rank
    yield "--qk-head-dim", mla.qk_nope_head_dim
    yield "--qk-pos-emb-head-dim", mla.qk_rope_head_dim
    yield "--v-head-dim", mla.v_head_dim
    yield ("--qk-layernorm",)
    yield "--rope-type", "rope"
    yield "--rotary-base", int(mla.rope_theta)
    yield ("--no-rope-fusion",)  # Megatron's fused rotation of MLA is for YaRN only
    if not dsa.ranks:
        return
    yield "--dsa-indexer-n-heads", dsa.index_num_heads
    yield "--dsa-indexer-head-dim", dsa.index_head_dim
    yield "--dsa-indexer-topk", dsa.top_k
    if recipe.shares_indices:
        offset, frequency = index_sharing(recipe)
        yield "--dsa-indexer-skip-topk-offset", offset
        yield "--dsa-indexer-topk-freq", frequency
    yield "--dsa-indexer-loss-coeff", dsa.loss_coeff
    yield ("--dsa-indexer-use-sparse-loss",)
    yield ("--no-dsa-indexer-rotate-activation",)


def _experts(recipe: Recipe, dispatcher: str) -> Iterator[Flag]:
    moe = recipe.moe
    if "E" not in recipe.layers.layers:
        return
    yield "--num-experts", moe.num_experts
    yield "--moe-router-topk", moe.top_k
    yield "--moe-ffn-hidden-size", moe.ffn_hidden_size
    yield "--moe-shared-expert-intermediate-size", moe.shared_ffn_hidden_size
    yield "--moe-router-score-function", "sigmoid"
    yield ("--moe-router-enable-expert-bias",)
    yield "--moe-router-load-balancing-type", "aux_loss"
    yield "--moe-aux-loss-coeff", moe.aux_loss_coeff
    yield "--moe-router-dtype", "fp32"
    yield "--moe-token-dispatcher-type", dispatcher


def _mamba(recipe: Recipe) -> Iterator[Flag]:
    mamba = recipe.mamba
    if "M" not in recipe.layers.layers:
        return
    yield "--mamba-state-dim", mamba.d_state
    yield "--mamba-head-dim", mamba.headdim
    yield "--mamba-num-groups", mamba.ngroups
    yield "--mamba-num-heads", recipe.mamba_heads


def _mtp(recipe: Recipe) -> Iterator[Flag]:
    if not recipe.mtp.num_depths:
        return
    yield "--mtp-num-layers", recipe.mtp.num_depths
    yield "--mtp-loss-scaling-factor", recipe.mtp.loss_coeff
