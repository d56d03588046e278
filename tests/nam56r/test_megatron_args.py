"""The flags, read by Megatron's own parser and made into Megatron's own configuration, beside the recipe."""

import argparse
import dataclasses
import math
import re
import sys
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.experimental_attention_variant.dsa import source_dsa_compute_layer
from megatron.training import arguments
from megatron.training.argument_utils import core_transformer_config_from_args, hybrid_config_from_args
from pydantic import BaseModel

from nam56r.megatron import patches
from nam56r.megatron.config import transformer_config
from nam56r.megatron.specs import nam56r_stack_spec
from nam56r.pattern import parse
from nam56r.recipe import DSA, PRESETS, MoE, Recipe
from nam56r.translate import DISPATCHERS, MegatronArgs, TranslationRefused, megatron_args, translate
from tests.nam56r.recipes import recipes

TINY = PRESETS["nam56r-tiny"]
# Fields of Megatron's configuration that the launch policy, or the device, owns.
PLACEMENT = {
    *("bf16", "params_dtype", "pipeline_dtype", "autocast_dtype"),  # precision
    *("cp_comm_type", "tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),  # parallelism
    *("use_cpu_initialization", "deallocate_pipeline_outputs", "inference_sampling_seed"),
    # fusions: the same mathematics, faster where there is a GPU
    *("bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion"),
    *("persist_layer_norm", "moe_token_dispatcher_type"),
}
# Fields that Megatron derives from the arguments and that our configuration doesn't need; `facts` and `check` have each.
DERIVED = {
    "experimental_attention_variant",
    "is_hybrid_model",
    "output_layer_init_method",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "transformer_impl",
}
UNREAD = {
    "rotary_scaling_factor",  # YaRN's; the rotation is plain
    "attention_softmax_in_fp32",  # of Megatron's unfused core attention: our cores and TE's always do
    "experimental_attention_variant_loss_scale_func",  # a function; Megatron finds the same one by the variant's name
}
# Families, and what our configuration says of one though the recipe has none of it.
MOE_FIELDS = re.compile(r"(num_)?moe_.*")
MLA_FIELDS = re.compile(r"multi_latent_attention|q?k?v?_.*(rank|dim)|qk_layernorm|rotary.*|rope_type|normalization")


@pytest.fixture(scope="module", autouse=True)
def megatron_reads_r():
    """Patterns are validated before --spec is imported, so R takes the patches of the grammar."""
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(Symbols, "VALID_LAYERS", Symbols.VALID_LAYERS)
        undo.setattr(Symbols, "M2RNN", "R", raising=False)
        for patch in patches.PATCHES:
            if patch.name in ("r-symbol", "r-name"):
                patch.apply()
        yield


@pytest.fixture(scope="module")
def parser():
    """Megatron's parser, made once: it takes a while."""
    return arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@pytest.fixture(scope="module")
def read(parser):
    """(words) -> the namespace that Megatron makes of them in one process, validated."""

    def read(words, *, validate=True):
        with pytest.MonkeyPatch.context() as given:
            given.setattr(arguments, "add_megatron_arguments", lambda empty: parser)
            given.setattr(arguments, "_print_args", lambda title, args: None)
            given.setattr(sys, "argv", ["pretrain", *words, "--micro-batch-size", "1"])
            given.delenv("WORLD_SIZE", raising=False)
            args = arguments.parse_args()
            if validate:
                arguments.validate_args(args)
            return args

    return read


def bundle(recipe, **options):
    return megatron_args(recipe, translate(recipe), **options)


def plain(value):
    """Initialisation functions are partials, which compare by identity."""
    return (value.func, value.args, value.keywords) if isinstance(value, partial) else value


def facts(recipe):
    """What Megatron must derive from the arguments, said by the recipe alone."""
    found = {
        "is_hybrid_model": True,
        "experimental_attention_variant": "dsa" if recipe.dsa.ranks else None,
        "num_layers": recipe.depth,
        "layernorm_epsilon": recipe.norm_eps,
        "init_method_std": recipe.init_std,
        "mtp_num_layers": recipe.mtp.num_depths or None,
    }
    if "M" in recipe.layers.layers:
        found |= {
            "mamba_state_dim": recipe.mamba.d_state,
            "mamba_head_dim": recipe.mamba.headdim,
            "mamba_num_groups": recipe.mamba.ngroups,
            "mamba_num_heads": recipe.mamba.expand * recipe.hidden_size // recipe.mamba.headdim,
        }
    return found


def compare(recipe, args):
    """Megatron's configuration from the arguments, beside ours from the recipe, over every field."""
    experts = "E" in recipe.layers.layers
    attention = "A" in recipe.layers.layers or recipe.mtp.num_depths > 0
    # the configuration of our own run has experts' sizes even without E, and then of any number but 0
    own = recipe if experts else recipe.model_copy(update={"moe": MoE()})
    ours = transformer_config(own, None, device=torch.device("cpu"))
    theirs = core_transformer_config_from_args(args)
    differing = {}
    for field in dataclasses.fields(theirs):
        name = field.name
        if name in PLACEMENT | DERIVED | UNREAD or (not experts and MOE_FIELDS.fullmatch(name)):
            continue
        if not attention and MLA_FIELDS.fullmatch(name):
            continue
        if not recipe.dsa.ranks and name.startswith("dsa_"):
            continue
        if not recipe.mtp.num_depths and name == "mtp_loss_scaling_factor":
            continue
        here, there = plain(getattr(theirs, name)), plain(getattr(ours, name))
        if here != there or type(here) is bool and here is not there:
            differing[name] = (here, there)
    assert differing == {}
    assert {name: getattr(theirs, name) for name in facts(recipe)} == facts(recipe)
    # Megatron scales the initialisation of output projections by √depth in a hybrid model, by √(2·depth) elsewhere
    std = theirs.output_layer_init_method.keywords["std"]
    assert math.isclose(std, recipe.init_std / math.sqrt(recipe.depth), rel_tol=1e-12)


def check(recipe, args):
    """Parsed and validated arguments say what the recipe says."""
    compare(recipe, args)
    assert args.seq_length == args.max_position_embeddings == recipe.seq_length
    # HybridModel takes these from the arguments and not from the configuration
    model = hybrid_config_from_args(args)
    assert model.vocab_size == recipe.vocab_size and not model.should_pad_vocab
    assert not model.share_embeddings_and_output_weights
    assert model.hybrid_layer_pattern == translate(recipe).native_pattern
    assert model.position_embedding_type in ("rope", "none")
    if translate(recipe).stack_spec:
        assert model.hybrid_stack_spec is nam56r_stack_spec and model.transformer.transformer_impl == "local"
    else:
        assert model.hybrid_stack_spec is None and model.transformer.transformer_impl == "transformer_engine"


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_presets_arrive_whole(read, recipe):
    check(recipe, read(bundle(recipe).args))


@settings(max_examples=60, deadline=None)
@given(recipe=recipes())
def test_any_recipe_arrives_whole_or_is_refused(read, recipe):
    try:
        given_args = bundle(recipe)
    except TranslationRefused as refused:
        shared, theta = recipe.shares_indices, not recipe.mla.rope_theta.is_integer()
        mixed = recipe.mamba.kind == "mamba2" and set("ER") & set(recipe.layers.layers) and "M" in recipe.layers.layers
        assert {r.operator for r in refused.refusals} <= {
            *["dsa"] * shared,
            *["mla"] * theta,
            *["mamba2"] * bool(mixed),
        }
        return
    check(recipe, read(given_args.args))


@settings(max_examples=30, deadline=None)
@given(
    recipe=recipes("AM").map(lambda r: r.with_overrides(["mamba.kind=mamba2", "mla.rope_theta=7", "dsa.share_every=1"]))
)
def test_without_e_and_r_a_recipe_of_mamba_2_is_megatrons_own(read, recipe):
    plan = translate(recipe, strict=True)
    assert plan.fully_native and plan.accepted and plan.stack_spec is None
    words = megatron_args(recipe, plan).args
    assert "--spec" not in words and "--transformer-impl" not in words
    check(recipe, read(words))


def test_a_layout_is_validated_as_stages(read):
    layout = "AEME|AEME|AEMR"
    words = megatron_args(TINY, translate(TINY, layout=layout)).args
    args = read((*words, "--pipeline-model-parallel-size", "1"), validate=False)
    assert args.hybrid_layer_pattern == "+EME|DEME|+EMR/+-"
    with pytest.MonkeyPatch.context() as given:
        given.setenv("WORLD_SIZE", "3")
        args.world_size, args.pipeline_model_parallel_size = 3, 3
        arguments.validate_args(args)
    assert args.virtual_pipeline_model_parallel_size is None and args.num_layers == 12


@settings(max_examples=40, deadline=None)
@given(recipe=recipes())
def test_every_flag_exists_and_none_is_the_launch_policys(parser, recipe):
    known = {option: action for action in parser._actions for option in action.option_strings}
    try:
        given_args = bundle(recipe)
    except TranslationRefused:
        assume(False)
    names = [flag[0] for flag in given_args.flags]
    assert set(names) <= known.keys() and len(set(names)) == len(names)
    assert tuple(word for flag in given_args.flags for word in flag) == given_args.args
    policy = r"parallel|batch|bf16|fp16|fp8|fp4|^--lr|optim|weight-decay|^--(data|train|save|load|seed|recompute|cuda)"
    assert [name for name in names if re.search(policy, name)] == []
    families = {"E": r"^--(moe|num-experts)", "M": r"^--mamba"}
    for symbol, flags in families.items():
        assert any(re.search(flags, name) for name in names) == (symbol in recipe.layers.layers)
    attention = "A" in recipe.layers.layers or recipe.mtp.num_depths > 0
    assert any(re.search(r"^--(multi-latent|q-lora|rope-type|rotary)", name) for name in names) == attention
    assert any("dsa" in name for name in names) == bool(recipe.dsa.ranks)
    assert any("mtp" in name for name in names) == (recipe.mtp.num_depths > 0)


def leaves(section, prefix=""):
    for name, value in section:
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(prefix + name, value)]


# another value for each, where "one more" or "twice" isn't valid
OTHERS = {
    "pattern": "AEMEAEMEAEME",
    "depth": 13,
    "mla.qk_rope_head_dim": 16,
    "dsa.ranks": "[1, 2]",
    "dsa.share_every": 2,
    "mamba.kind": "mamba2",
    "mamba.ngroups": 4,
    "m2rnn.conv_width": 3,
}


@pytest.mark.parametrize("leaf", [name for name, _ in leaves(TINY) if name not in ("name", "features")])
def test_no_value_changes_without_a_trace(leaf):
    """Each value is in a flag, or in a note by its name; `name` is a label, `features` hold no values."""
    base = TINY.with_overrides(["dsa.ranks=[0, 1, 2]"]) if leaf == "dsa.share_every" else TINY
    value = OTHERS.get(leaf, 2 * dict(leaves(base))[leaf])
    changed = base.with_overrides([f"{leaf}={value}"])
    assert changed != base
    before = bundle(base)
    try:
        after = bundle(changed)
    except TranslationRefused as refused:
        assert leaf == "mamba.kind" and "mamba.kind = mamba2" in str(refused)
        return
    if before.args == after.args:
        assert any(f"{leaf} = {value}" in note for note in after.custom_notes)


# flags that say again what Megatron would also find by itself, or by default
SAID_TWICE = {"--num-layers", "--multi-latent-attention", "--mtp-num-layers"}  # in the pattern
SAID_TWICE |= {"--moe-router-load-balancing-type", "--moe-token-dispatcher-type"}


def test_every_flag_is_needed(read):
    """Without it Megatron's configuration is another: what the comparison would not see, it could not hold either."""
    unusual = "norm_eps=0.003 init_std=0.5 hidden_size=320 mtp.loss_coeff=0.7 mla.num_heads=3 mla.kv_lora_rank=48 "
    unusual += "mamba.headdim=32 mamba.ngroups=5 moe.top_k=3"
    recipe = TINY.with_overrides(unusual.split())
    flags = bundle(recipe).flags
    unseen = set()
    for left_out in flags:
        try:
            check(recipe, read([word for flag in flags if flag != left_out for word in flag]))
        except (Exception, SystemExit):  # AssertionError: Megatron's own checks, and those here
            continue
        unseen.add(left_out[0])
    assert unseen == SAID_TWICE


def test_shared_indices_are_megatrons_where_layer_numbers_can_say_them(read):
    recipe = PRESETS["nam56r"].with_overrides(["dsa.share_every=3"])
    args = read(bundle(recipe).args)
    offset, frequency = args.dsa_indexer_skip_topk_offset, args.dsa_indexer_topk_freq
    latest = None
    for layer in recipe.sparse_layers:
        latest = layer if layer in recipe.indexer_layers else latest
        assert source_dsa_compute_layer(layer, offset, frequency) == latest
    assert (offset, frequency) == (5, 16)
    uneven = recipe.with_overrides(["dsa.ranks=[0, 1, 2, 5, 6]", "dsa.share_every=2"])
    with pytest.raises(TranslationRefused, match="dsa.share_every = 2 counts sparse slots.* set dsa.share_every to 1"):
        bundle(uneven)


@settings(max_examples=60, deadline=None)
@given(recipe=recipes("A").map(lambda r: r.with_overrides(["mla.rope_theta=7", "dsa.share_every=2"])))
def test_index_sharing_is_megatrons_or_refused(recipe):
    assume(recipe.shares_indices)
    try:
        flags = dict(flag for flag in bundle(recipe).flags if len(flag) == 2)
    except TranslationRefused:
        sources = {layer: max(n for n in recipe.indexer_layers if n <= layer) for layer in recipe.sparse_layers}
        for offset in range(recipe.depth + 1):
            for frequency in range(1, recipe.depth + 1):
                said = {layer: source_dsa_compute_layer(layer, offset, frequency) for layer in sources}
                assert said != sources
        return
    offset, frequency = int(flags["--dsa-indexer-skip-topk-offset"]), int(flags["--dsa-indexer-topk-freq"])
    for layer in recipe.sparse_layers:
        source = max(number for number in recipe.indexer_layers if number <= layer)
        assert source_dsa_compute_layer(layer, offset, frequency) == source


def test_a_refused_translation_has_no_arguments():
    recipe = TINY.with_overrides(["features.engram=[2]", "moe.num_experts=0", "mla.rope_theta=0.5"])
    with pytest.raises(TranslationRefused) as refused:
        bundle(recipe)
    text = str(refused.value)
    for culprit in ("engram", "layer 2 is E", "moe.num_experts = 0", "layers 2, 4, 6, 8, 10", "mla.rope_theta = 0.5"):
        assert culprit in text
    assert refused.value.refusals == translate(recipe).refusals
    with pytest.raises(TranslationRefused, match="strict"):
        megatron_args(TINY, translate(TINY, strict=True))


def test_refuses_another_recipe_and_an_unknown_dispatcher():
    with pytest.raises(ValueError, match="the translation is of nam56r-tiny, not of nam56r"):
        megatron_args(PRESETS["nam56r"], translate(TINY))
    with pytest.raises(ValueError, match="translation is of nam56r-tiny.* translate the recipe itself"):
        megatron_args(TINY.with_overrides(["dsa.ranks=[]"]), translate(TINY))
    with pytest.raises(ValueError, match="dispatcher is 'all', but must be one of alltoall, allgather, flex"):
        bundle(TINY, dispatcher="all")


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_the_dispatcher_is_the_callers(parser, dispatcher):
    words = bundle(TINY, dispatcher=dispatcher).args
    assert parser.parse_args(words).moe_token_dispatcher_type == dispatcher


def test_relu2_beside_swiglu_has_no_flags(read):
    """What makes E a seam: the two activations are flags of the whole model, and Megatron takes only one."""
    args = read((*bundle(TINY).args, "--squared-relu"))
    with pytest.raises(AssertionError):
        core_transformer_config_from_args(args)


def test_the_variant_of_d_is_the_whole_models(read):
    """What the note on D says."""
    assert core_transformer_config_from_args(read(bundle(TINY).args)).experimental_attention_variant == "dsa"
    dense = TINY.model_copy(update={"dsa": DSA()})
    assert core_transformer_config_from_args(read(bundle(dense).args)).experimental_attention_variant is None
    assert any(note.startswith("dsa:") for note in bundle(TINY).custom_notes)
    assert not any(note.startswith("dsa:") for note in bundle(dense).custom_notes)


def test_a_bundle_goes_through_json():
    words = bundle(TINY)
    assert MegatronArgs.model_validate_json(words.model_dump_json()) == words
    assert parse(TINY.pattern).layers and Recipe.load("nam56r-tiny") == TINY
