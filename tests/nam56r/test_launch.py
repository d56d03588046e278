"""The launch contract: every check by itself, remedies that work, flags that are Megatron's own, two fields never one."""

import argparse
import functools
import os
import re

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from megatron.training import arguments
from megatron.training.argument_utils import core_transformer_config_from_args

from nam56r.kernels.registry import DEVICES
from nam56r.launch import (
    PROFILES,
    LaunchContract,
    LauncherProfile,
    LaunchRefused,
    RunOptions,
    make_contract,
    shell,
)
from nam56r.launch.profile import ENVIRONMENT, purpose
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.pretrain import CPU_ARGUMENTS
from nam56r.recipe import PRESETS, Recipe
from nam56r.report.launch import render
from tests.nam56r.parallel_worker import small_recipe

# BooleanOptionalAction, which Megatron's parser uses
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

RUN = RunOptions(data="data/x", out="runs/a", steps=40)
TINY, NAM56R = PRESETS["nam56r-tiny"], PRESETS["nam56r"]
REFERENCES = [
    f"kernels.{operator}=reference" for operator in ("index_top_k", "sparse_latent_attention", "indexer_kl_loss")
]


def contract_of(recipe, profile, *policy, run=RUN, **options):
    """The contract, accepted or refused."""
    try:
        return make_contract(recipe, profile.with_overrides(policy), run, **options)
    except LaunchRefused as refused:
        return refused.contract


def refused_names(contract):
    return [check.name for check in contract.refused]


# --- profiles


def test_presets_have_the_published_forms():
    profile, record = PROFILES["h200-x8"], PROFILES["h200-x8-record"]
    assert (profile.tp, profile.pp, profile.vpp, profile.ep) == (1, 2, 2, 1)
    assert (profile.micro_batch, profile.global_batch, profile.mtp_depths) == (4, 64, 2)
    assert profile.cuda_graphs != "none"
    assert (record.tp, record.pp, record.ep, record.micro_batch) == (1, 1, 4, 8)
    assert (record.precision, record.cuda_graphs) == ("bf16", "none")
    assert {name: p.processes for name, p in PROFILES.items()} == {
        "h200": 1,
        "h200-x2": 2,
        "h200-x8": 8,
        "h200-x8-record": 8,
        "cpu": 1,
        "cpu-x2": 2,
    }


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_comes_back_from_yaml_and_json(profile, tmp_path):
    profile.save(tmp_path / "p.yaml")
    assert LauncherProfile.load(tmp_path / "p.yaml") == profile
    assert LauncherProfile.model_validate_json(profile.model_dump_json()) == profile
    assert list(LauncherProfile.load(tmp_path / "p.yaml").environment) == list(profile.environment)


def test_the_environment_is_in_the_order_of_purposes():
    mixed = {"OMP_NUM_THREADS": 4, "CUDA_DEVICE_MAX_CONNECTIONS": 1, "NCCL_DEBUG": "INFO", "ZZZ": "1"}
    mixed |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TRITON_CACHE_DIR": "/c"}
    names = list(LauncherProfile(name="x", environment=mixed).environment)
    order = [*ENVIRONMENT, None]
    assert [order.index(purpose(name)) for name in names] == sorted(order.index(purpose(name)) for name in mixed)
    assert names[0] == "TRITON_CACHE_DIR" and names[-1] == "ZZZ"


def test_the_schema_names_every_key_and_what_it_may_be():
    schema = LauncherProfile.model_json_schema()
    assert schema["properties"].keys() == LauncherProfile.model_fields.keys()
    assert schema["properties"]["cuda_graphs"]["enum"] == ["none", "local", "transformer_engine", "full_iteration"]
    assert schema["properties"]["device"]["enum"] == list(DEVICES)
    assert schema["additionalProperties"] is False
    # what the schema has of patterns and bounds is what a profile takes
    guards = schema["$defs"]["Guards"]["properties"]
    assert guards["clip_grad"]["exclusiveMinimum"] == 0
    for key, values in {
        "name": ["x", "", " x", "a\nb", "é x"],
        "rendezvous": ["a:1", "node-0.b:29500", "a", ":1", "-a:1", "a b:1", "a:123456"],
    }.items():
        pattern = schema["properties"][key]["pattern"]
        for value in values:
            assert bool(re.search(pattern, value)) == taken({"name": "x"} | {key: value}), (key, value)
    names = schema["properties"]["environment"]["propertyNames"]["pattern"]
    assert schema["properties"]["environment"]["additionalProperties"]["type"] == ["string", "number"]
    for name in ("A", "_1", "1A", "", "A B", "é"):
        assert bool(re.search(names, name)) == taken({"name": "x", "environment": {name: 1}}), name


def taken(values):
    try:
        return bool(LauncherProfile(**values))
    except ValueError:
        return False


def test_cuda_graph_implementations_are_megatrons():
    choices = next(a.choices for a in parser()._actions if a.dest == "cuda_graph_impl")
    assert set(choices) == set(LauncherProfile.model_json_schema()["properties"]["cuda_graphs"]["enum"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tp", "--policy tp: must be key=value, such as tp=2"),
        ("tp=0", "tp = 0: must be greater than or equal to 1"),
        ("tp=true", "tp = True: must be a valid integer"),
        ("tp=1.0", "tp = 1.0: must be a valid integer"),
        ("tpp=2", "unknown key tpp: the nearest is tp"),
        ("guards.clip=2", "unknown key guards.clip: the nearest is guards.clip_grad"),
        ("guards=2", "guards is a section: set one of its keys"),
        ("environment=2", "environment is a section: set one of its keys"),
        ("device=h2000", "device = 'h2000', but must be one of cpu, a100, h100, h200, b200"),
        ("cuda_graphs=on", "cuda_graphs = True: must be 'none', 'local', 'transformer_engine' or 'full_iteration'"),
        ("environment.A B=1", "environment: 'A B' is no variable's name"),
        ('environment.A="a\\0b"', "environment.A has a NUL character"),
        ("environment.NCCL_DEBUG=true", "environment.NCCL_DEBUG = True: must be a valid string"),
        ("rendezvous=here", "rendezvous = 'here', but must be HOST:PORT"),
        ("guards.clip_grad=.nan", "guards.clip_grad"),
        ("tp=[", "the value is no YAML"),
        ("layout=1", "layout = 1: must be a valid string"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(setting, message):
    with pytest.raises(ValueError) as error:
        PROFILES["h200"].with_overrides([setting])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_null_takes_a_variable_out():
    assert "NCCL_DEBUG" not in PROFILES["h200-x2"].with_overrides(["environment.NCCL_DEBUG=null"]).environment


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*LauncherProfile.model_fields, "x"]) | st.text(max_size=5), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=YAML, noise=st.binary(max_size=40))
def test_any_file_is_a_profile_or_a_value_error(document, noise, tmp_path):
    path = tmp_path / "fuzz.yaml"
    for content in (yaml.safe_dump(document).encode(), noise):
        path.write_bytes(content)
        try:
            assert isinstance(LauncherProfile.load(path), LauncherProfile)
        except ValueError as error:
            assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from([*LauncherProfile.model_fields, "guards.clip_grad", "environment.A", ""]),
    value=st.text(max_size=12),
)
def test_any_setting_is_taken_or_a_value_error(key, value):
    try:
        assert isinstance(PROFILES["cpu"].with_overrides([f"{key}={value}"]), LauncherProfile)
    except ValueError as error:
        assert "\n" not in str(error)


# --- each check by itself: what is asked, which check refuses it, and words of its answer

SEGMENTED = "layout=AEMEAE|MEAEMR"
ONE_FAULT = [
    ("cpu", ["layout=AEMEAEMEAEMM"], "layout", "has M at layer 12, but the recipe has R"),
    ("cpu", ["layout=AEM"], "layout", "spells 3 layers, but the recipe has 12"),
    ("cpu", ["depth=13"], "depth", "depth = 12"),
    ("cpu", ["r_layer_indices=[11]"], "r_layer_indices", "r_layer_indices = [12]"),
    ("cpu", ["dsa_ranks=[0]"], "dsa_ranks", "dsa_ranks = [1]"),
    ("cpu", ["mtp_depths=2"], "mtp_depths", "mtp_depths = 1"),
    ("cpu", [SEGMENTED], "segments", "2 pipeline segments"),
    ("cpu-x2", ["entry=pretrain", "pp=2", "vpp=5"], "segments", "pp 2 · vpp 5 = 10"),
    ("cpu-x2", ["entry=pretrain", "vpp=2"], "virtual pipeline", "vpp 2 with pp 1"),
    ("cpu-x2", ["tp=4"], "processes", "tp 4 · pp 1 · cp 1 = 4"),
    ("cpu-x2", ["ep=3"], "experts", "ep = 2"),
    ("cpu", ["nodes=2", "global_batch=2"], "nodes", "rendezvous none"),
    ("cpu", ["rendezvous=node0:29500"], "nodes", "rendezvous = null"),
    ("cpu-x2", ["tp=2", "global_batch=1", "gpus_per_node=16"], "batch", "global_batch = 8"),
    ("cpu-x2", ["global_batch=3"], "batch", "global_batch = 2; or global_batch = 4"),
    ("cpu-x2", ["entry=pretrain", "pp=2", "vpp=2", "global_batch=3"], "interleaving", "3 microbatches, pp 2"),
    ("cpu-x2", ["entry=pretrain", "cp=2"], "context parallel", "cp 2"),
    ("cpu", ["entry=pretrain", "precision=bf16"], "precision", "bf16 on cpu"),
    ("cpu-x2", ["entry=pretrain", "pp=2"], "sparse A on every stage", "by pipeline rank: 1, 0"),
    ("cpu-x2", ["entry=pretrain", "pp=2", "layout=AEMEAEMEAE|MR"], "E on every stage", "by pipeline rank: 5, 0"),
    ("cpu", ["guards.loss_scale=8", "entry=pretrain"], "loss scale", "8.0 with fp32"),
    ("h200", ["distributed_optimizer=false", "entry=pretrain"], "optimizer", "distributed_optimizer = true"),
    ("cpu", ["sparse_mode=warmup"], "sparse mode", "no implementation"),
    ("cpu", ["entry=pretrain", "cuda_graphs=local"], "graphs: device", "local on cpu"),
    ("cpu", ["environment.NVIDIA_TF32_OVERRIDE=1"], "environment", "NVIDIA_TF32_OVERRIDE = 1"),
    ("cpu", ["recompute=full"], "entry", "entry = pretrain"),
    ("cpu-x2", ["pp=2"], "entry", "pp = 2"),
    ("cpu", ["kernels.m2rnn=fastest"], "kernel names", "m2rnn has no kernel fastest: one of cuda, reference"),
    ("cpu", ["kernels.m3rnn=reference"], "kernel names", "m3rnn is no operator: one of mla_attention"),
    ("h200", ["device=a100"], "plan", "index_top_k at 5: cuda: a100 is sm_80"),
    (
        "cpu-x2",
        ["tp=2", "kernels.linear_cross_entropy=torch"],
        "plan",
        "linear_cross_entropy=torch is asked for by name, but tp > 1 splits the vocabulary",
    ),
    ("h200", [*REFERENCES, "entry=pretrain", "guards.check_nan=true", "precision=fp16"], "NaN check", "dynamic"),
    (
        "h200",
        [*REFERENCES, "entry=pretrain", "cuda_graphs=local"],
        "graphs: kernels",
        "index_top_k=reference at 5",
    ),
    ("h200", ["entry=pretrain", "cuda_graphs=local", "recompute=full"], "graphs: recompute", "recompute = none"),
    ("h200", ["entry=pretrain", "cuda_graphs=full_iteration"], "graphs: NaN check", "guards.check_nan = false"),
    ("h200-x2", ["entry=pretrain", "cuda_graphs=local"], "graphs: experts", "ep 2"),
    ("h200", ["entry=pretrain", "cuda_graphs=transformer_engine"], "graphs: allocator", "NCCL_GRAPH_REGISTER unset"),
    ("h200", ["environment.PYTORCH_CUDA_ALLOC_CONF=x"], "allocator", "PYTORCH_CUDA_ALLOC_CONF"),
    (
        "h200-x2",
        ["tp=2", "ep=1", "environment.CUDA_DEVICE_MAX_CONNECTIONS=8"],
        "connections",
        "CUDA_DEVICE_MAX_CONNECTIONS 8",
    ),
    ("cpu", ["micro_batch=65536", "global_batch=65536"], "memory", "GiB estimated on pipeline rank 0"),
]


def test_shared_indices_between_stages():
    """NAM56R's own layout: our layers hand them on, Megatron's don't; and a stage may have none that computes."""
    recipe = NAM56R.with_overrides(["dsa.share_every=3"])
    published = contract_of(recipe, PROFILES["h200-x8"], "cuda_graphs=none")
    said = {check.name: check for check in published.checks}
    assert said["sparse A on every stage"].value == "sparse A layers with an indexer by pipeline rank: 2, 1"
    assert said["shared indices"].passed and "256 of 32 bits beside" in said["shared indices"].value
    assert published.accepted and "5 for 9, 13; 21 for 25, 29; 37 for 41, 45" in "".join(published.notes)
    assert not [check for check in contract_of(recipe, PROFILES["h200"]).checks if check.name == "shared indices"]
    for kind in ("transformer_engine", "local"):
        of_layers = contract_of(recipe, PROFILES["h200"], "entry=pretrain", f"cuda_graphs={kind}")
        assert "graphs: shared indices" in refused_names(of_layers)
    whole = contract_of(recipe, PROFILES["h200"], "entry=pretrain", "cuda_graphs=full_iteration")
    assert "graphs: shared indices" not in refused_names(whole)

    small = ["pattern=AM", "depth=8", "mamba.kind=mamba2", "dsa.ranks=[0, 1, 2, 3]", "dsa.share_every=2"]
    stages = ["entry=pretrain", "pp=2"]
    native = contract_of(small_recipe(*small), PROFILES["cpu-x2"], *stages, "layout=AM|AMAMAM")
    assert "shared indices" in refused_names(native)
    native = contract_of(small_recipe(*small), PROFILES["cpu-x2"], *stages, "layout=AMAM|AMAM")
    assert "shared indices" not in refused_names(native)
    ours = contract_of(small_recipe(*small[:2], *small[3:]), PROFILES["cpu-x2"], *stages, "layout=AMAMAM|AM")
    assert refused_names(ours) == ["sparse A on every stage"]
    assert ours.refused[0].value == "sparse A layers with an indexer by pipeline rank: 2, 0"


@pytest.mark.parametrize(
    ("profile", "policy", "name", "words"), ONE_FAULT, ids=[f"{f[2]}-{i}" for i, f in enumerate(ONE_FAULT)]
)
def test_each_fault_is_refused_by_its_check(profile, policy, name, words):
    contract = contract_of(TINY, PROFILES[profile], *policy)
    found = [check for check in contract.refused if check.name == name]
    assert len(found) == 1, refused_names(contract)
    assert words in f"{found[0].value} {found[0].rule} {found[0].remedy}"
    assert not contract.accepted


def test_without_transformer_engine_its_graphs_and_megatrons_own_stack_are_refused(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    native = TINY.with_overrides(["pattern=A", "depth=1", "dsa.ranks=[]"])
    for there in (False, True):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: there or None if name == "transformer_engine" else find(name, *a),
        )
        graphs = contract_of(TINY, PROFILES["h200"], "entry=pretrain", "cuda_graphs=transformer_engine")
        assert ("graphs: Transformer Engine" in refused_names(graphs)) is not there
        assert ("stack" in refused_names(contract_of(native, PROFILES["h200"], "entry=pretrain"))) is not there
    assert "stack" not in refused_names(contract_of(TINY, PROFILES["h200"], "entry=pretrain"))


def test_51_heads_are_replicated_under_tp_with_a_note():
    contract = contract_of(NAM56R, PROFILES["h200-x2"], "tp=2", "ep=1")
    (check,) = [check for check in contract.checks if check.name == "R under tp"]
    assert check.passed and check.value == "51 heads on each of the 2 ranks"
    assert "R is replicated on every tensor-parallel rank" in contract.notes
    assert "tensor parallel" not in refused_names(contract)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mla.num_heads=3", "mla.num_heads = 3"),
        ("mla.q_lora_rank=33", "mla.q_lora_rank = 33"),
        ("mamba.ngroups=1", "mamba.ngroups = 1"),
        ("moe.shared_ffn_hidden_size=255", "moe.shared_ffn_hidden_size = 255"),
        ("ffn_hidden_size=511", "ffn_hidden_size = 511"),
        ("vocab_size=511", "vocab_size = 511"),
        ("seq_length=255", "seq_length = 255"),
    ],
)
def test_what_tp_splits_must_divide(change, words):
    contract = contract_of(TINY.with_overrides([change]), PROFILES["cpu-x2"], "tp=2")
    (check,) = [check for check in contract.refused if check.name == "tensor parallel"]
    assert f"{words} doesn't divide by tensor_parallel = 2" in check.value and check.remedy == "tp = 1"


def test_heads_are_asked_of_a_model_without_attention_too(megatron):
    recipe = TINY.with_overrides(["pattern=MR", "dsa.ranks=[]", "mtp.num_depths=0", "mla.num_heads=3"])
    contract = contract_of(recipe, PROFILES["cpu-x2"], "tp=2", "entry=pretrain")
    (check,) = contract.refused
    assert check.name == "tensor parallel" and check.value == "mla.num_heads = 3 doesn't divide by tensor_parallel = 2"
    with pytest.raises(ValueError, match="num_attention_heads .3. must be a multiple"):
        validated(contract, megatron)


def test_a_kernel_by_name_that_nothing_runs_is_noted():
    recipe = TINY.with_overrides(["pattern=AM", "dsa.ranks=[]"])
    contract = contract_of(recipe, PROFILES["cpu"], "kernels.m2rnn=reference", "kernels.mamba3_scan=reference")
    assert contract.accepted and "no part of the model runs the operator of m2rnn=reference" in contract.notes


def test_a_refusal_lists_everything_at_once():
    policy = ["tp=3", "cp=2", "vpp=5", "sparse_mode=warmup", "precision=fp16", "environment.FOO=1", "mtp_depths=7"]
    policy += ["kernels.m2rnn=fastest", "cuda_graphs=local", "recompute=full", "global_batch=63", "ep=5", "depth=3"]
    policy += ["device=a100"]
    recipe = TINY.with_overrides(["features.engram=[1]"])
    contract = contract_of(recipe, PROFILES["h200-x2"], *policy, strict=True)
    assert set(refused_names(contract)) >= {
        *("depth", "mtp_depths", "segments", "virtual pipeline", "processes", "experts", "tensor parallel"),
        *("context parallel", "batch", "NaN check", "sparse mode", "graphs: recompute", "graphs: experts"),
        *("environment", "entry", "translation", "kernel names", "plan", "memory"),
    }
    message = str(LaunchRefused(contract))
    assert all(f"  {name}: " in message for name in refused_names(contract))
    assert "engram (Engram memory) has no implementation" in message and "strict refuses every seam" in message
    # the plan is judged as if tp divided, so that this isn't found out in a second attempt
    assert "index_top_k at 5" in message
    assert contract.generated_native_args == () and not contract.plan.accepted


def test_the_h200_presets_are_accepted():
    """And what docs/launch.md says of references in them."""
    presets = [name for name in PROFILES if "h200" in name]
    for name in presets:
        contract = contract_of(NAM56R, PROFILES[name])
        assert contract.accepted, contract.refused
        assert not any("reference" in names for names in contract.plan.kernels.values())
    named = {name: refused_names(contract_of(NAM56R, PROFILES[name], *REFERENCES)) for name in presets}
    assert named == {"h200": [], "h200-x2": [], "h200-x8": ["graphs: kernels", "memory"], "h200-x8-record": []}
    assert refused_names(contract_of(NAM56R, PROFILES["h200-x8-record"], "recompute=none")) == ["memory"]


def test_the_layout_is_resolved():
    contract = contract_of(NAM56R, PROFILES["h200-x8"])
    p = contract.profile
    assert p.layout == "AEMEAEMEAEMRA|EMEAEMEAEMRAE|MEAEMEAEMRAEM|EAEMEAEMRAEME"
    assert (p.depth, p.r_layer_indices, p.mtp_depths) == (52, (12, 24, 36, 48), 2)
    assert p.dsa_ranks == (1, 2, 3, 5, 6, 7, 9, 10, 11)
    # rank 0 has segments 1 and 3, rank 1 has 2 and 4
    assert [rank.layers for rank in contract.memory] == [tuple(p.layout.split("|")[i::2]) for i in (0, 1)]
    assert contract.processes.torchrun[:5] == ("torchrun", "--standalone", "--nnodes", "1", "--nproc-per-node")
    assert contract_of(NAM56R, p).generated_native_args == contract.generated_native_args
    both = TINY.with_overrides(["dsa.ranks=[0, 2]"])
    own = contract_of(both, PROFILES["cpu-x2"], "entry=pretrain", "pp=2", "layout=AEMEAEME|AEMR")
    assert own.accepted and [rank.layers for rank in own.memory] == [("AEMEAEME",), ("AEMR",)]


def test_the_run_s_folder_is_in_the_environment_and_nothing_else_is_replaced():
    profile = PROFILES["cpu"].with_overrides(["environment.X_CACHE_DIR='{run}/$HOME/{other}'"])
    contract = contract_of(TINY, profile, run=RunOptions(data="-d", out="-r {run}", steps=3))
    assert contract.fixed_policy.environment["X_CACHE_DIR"] == "./-r {run}/$HOME/{other}"
    assert "./-d" in contract.run_args and "./-r {run}" in contract.run_args


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"data": ""}, "data = ''"),
        ({"out": "a\0"}, "out = 'a"),
        ({"warmup_steps": 40}, "warmup_steps = 40, but must be less than steps = 40"),
        ({"min_lr": 1.0}, "min_lr = 1.0, but must not be more than lr = 0.001"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"seed": 0}, "seed = 0"),
        ({"out": "a\udcff", "min_lr": 1.0}, "out = 'a\\udcff', but must be a path in UTF-8"),
        ({"out": "a\udcff", "min_lr": 1.0}, "min_lr = 1.0, but must not be more"),
    ],
)
def test_wrong_run_options_are_one_line(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RunOptions(**(RUN.model_dump() | change))


# --- what holds for any profile

FEW = st.sampled_from([1, 1, 1, 2, 2, 3, 4])
PROFILE = st.fixed_dictionaries(
    {},
    optional={
        "gpus_per_node": st.sampled_from([1, 2, 4, 6, 8]),
        "nodes": st.sampled_from([1, 1, 2]),
        "rendezvous": st.sampled_from([None, "node0:29500"]),
        "tp": FEW,
        "pp": FEW,
        "vpp": FEW,
        "ep": FEW,
        "cp": st.sampled_from([1, 1, 1, 2]),
        "micro_batch": FEW,
        "global_batch": st.sampled_from([1, 8, 16, 24, 48, 7, 2**20]),
        "layout": st.sampled_from([None, None, None, "AEM|RA", "AE|M|R|A", "AEM"]),
        "mtp_depths": st.sampled_from([None, None, 1, 2]),
        "r_layer_indices": st.sampled_from([None, None, [4], [5]]),
        "sparse_mode": st.sampled_from(["sparse", "sparse", "warmup"]),
        "cuda_graphs": st.sampled_from(["none", "none", "local", "transformer_engine", "full_iteration"]),
        "recompute": st.sampled_from(["none", "full"]),
        "precision": st.sampled_from(["bf16", "fp16", "fp32"]),
        "distributed_optimizer": st.booleans(),
        "guards": st.fixed_dictionaries({"check_nan": st.booleans(), "loss_scale": st.sampled_from([None, 1024.0])}),
        "environment": st.dictionaries(
            st.sampled_from(["NCCL_DEBUG", "FOO", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "A_CACHE_DIR"]),
            st.sampled_from(["1", "0", "{run}/c", "expandable_segments:True"]),
            max_size=3,
        ),
        "entry": st.sampled_from(["pretrain", "train"]),
    },
)
RECIPES = st.sampled_from(
    [
        small_recipe(),
        small_recipe("mtp.num_depths=0"),
        small_recipe("mtp.num_depths=2", "pattern=AAMMRE", "depth=6"),
        small_recipe("pattern=MR", "depth=4", "dsa.ranks=[]", "mtp.num_depths=0"),
        small_recipe("features.mod=[2]", "mla.num_heads=3", "seq_length=30"),
    ]
)
REFERENCE = {setting.split(".")[1].split("=")[0]: "reference" for setting in REFERENCES}


@st.composite
def launches(draw):
    """A recipe and a profile of any kind, mostly refused."""
    values = {"name": "any", "device": draw(st.sampled_from(list(DEVICES))), "gpus_per_node": 4} | draw(PROFILE)
    return draw(RECIPES), LauncherProfile(**values, kernels=draw(st.sampled_from([{}, REFERENCE])))


@st.composite
def fitting_launches(draw, entry):
    """A recipe and a profile on the CPU whose sizes fit together."""
    two = st.sampled_from([1, 2])
    tp, dp = draw(two), draw(st.sampled_from([1, 2, 4]))
    pp = draw(two) if entry == "pretrain" else 1
    vpp = draw(two) if pp > 1 else 1
    # E and sparse A on every rank of a pipeline
    mixed = small_recipe("pattern=AEMAERAEAE", "depth=10", "dsa.ranks=[0, 1, 2, 3]", "mtp.num_depths=2")
    recipe = (
        mixed if pp > 1 else draw(st.sampled_from([small_recipe(), mixed, small_recipe("pattern=MR", "dsa.ranks=[]")]))
    )
    layers = recipe.layers.layers
    cuts = [0, *sorted(draw(st.sets(st.integers(1, len(layers) - 1), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))]
    pieces = [layers[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]
    assume(all(set("AE") <= set("".join(pieces[rank::pp])) for rank in range(pp)) or pp == 1)
    micro = draw(two)
    guards = {"check_nan": entry == "train" or draw(st.booleans()), "clip_grad": draw(st.sampled_from([0.5, 1.0]))}
    return recipe, LauncherProfile(
        name="fits",
        entry=entry,
        **{"device": "cpu", "precision": "fp32", "distributed_optimizer": False, "kernels": REFERENCE},
        **{
            "tp": tp,
            "pp": pp,
            "vpp": vpp,
            "ep": draw(st.sampled_from([n for n in (1, 2, 4) if not tp * dp % n and (n == 1 or "E" in layers)])),
        },
        gpus_per_node=tp * pp * dp,
        layout="|".join(pieces),
        micro_batch=micro,
        global_batch=micro * dp * pp * draw(st.integers(1, 3)),
        guards=guards,
        recompute=draw(st.sampled_from(["none", "full"])) if entry == "pretrain" else "none",
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(launch=launches(), strict=st.booleans())
def test_any_launch_is_a_contract_or_refused_with_reasons(launch, strict):
    recipe, profile = launch
    contract = contract_of(recipe, profile, strict=strict)
    assert contract.accepted == (not contract.refused)
    for check in contract.checks:
        assert check.name and check.value and check.rule
        assert check.passed or check.remedy, check
    names = [check.name for check in contract.checks]
    assert len(names) == len(set(names))
    assert LaunchContract.model_validate_json(contract.model_dump_json()) == contract
    lines = render(contract).splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    if contract.accepted:
        assert contract.plan.accepted and contract.memory and contract.generated_native_args
    else:
        with pytest.raises(ValueError, match="is refused"):
            shell(contract)


def settings_of(alternative):
    """["tp=2", …] of "tp = 2, pp = 1"; none where an alternative isn't only a profile's keys."""
    parts = re.split(r", (?=[a-z_]+(?:\.\w+)? = )", alternative)
    found = [re.fullmatch(r"([a-z_0-9]+(?:\.\w+)?) = (\S.*?)", part) for part in parts]
    return [f"{match[1]}={match[2]}" for match in found] if all(found) else []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(launch=launches())
def test_every_remedy_that_names_a_key_satisfies_its_check(launch):
    recipe, profile = launch
    tried = 0
    for check in contract_of(recipe, profile).refused:
        for alternative in check.remedy.split("; or "):
            policy = settings_of(alternative)
            if policy:
                tried += 1
                assert check.name not in refused_names(contract_of(recipe, profile, *policy)), (check, policy)
    assume(tried)


def sequences(value):
    """Every sequence of text in plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        if value and all(isinstance(item, str) for item in value):
            yield list(value)
        for item in value:
            yield from sequences(item)
    elif isinstance(value, str):
        yield value.split()


def test_nothing_of_a_contract_puts_native_and_policy_flags_together():
    for profile in ("h200-x8-record", "cpu"):
        contract = contract_of(TINY, PROFILES[profile], *REFERENCES)
        native = {word for word in contract.generated_native_args if word.startswith("--")}
        policy = {word for word in contract.fixed_policy.args if word.startswith("--")}
        run = {word for word in contract.run_args if word.startswith("--")}
        assert native and policy and run
        assert not native & policy and not native & run and not policy & run

        def apart(value):
            for words in sequences(value):
                assert not (native & set(words) and (policy | run) & set(words)), words

        own = [name for name in vars(LaunchContract) if not name.startswith("_") and name != "model_config"]
        own += [name for name in LaunchContract.model_fields]
        seen = 0
        for part in (
            contract,
            contract.fixed_policy,
            contract.processes,
            contract.plan,
            contract.run,
            contract.profile,
        ):
            for name in {*own, *vars(type(part))}:
                if name.startswith(("_", "model_")) or not hasattr(part, name):
                    continue
                value = getattr(part, name)
                if callable(value) and name not in ("save", "load", "with_overrides"):
                    value = value()
                if not callable(value):
                    seen += 1
                    apart(value.model_dump() if hasattr(value, "model_dump") else value)
        assert seen > 20
        apart(contract.model_dump(mode="json"))


# --- flags


@functools.cache
def parser():
    return arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))


def parsed(contract):
    """What Megatron's own parser makes of all three groups."""
    args = parser().parse_args([*contract.generated_native_args, *contract.fixed_policy.args, *contract.run_args])
    # what parse_args adds
    args._is_global_batch_size_explicitly_specified = True
    args.rank, args.world_size = 0, contract.profile.processes
    return args


@pytest.fixture
def megatron(monkeypatch):
    """Megatron's validation on this machine, quiet."""
    apply_patches("model")
    monkeypatch.setattr(arguments, "_print_args", lambda *_: None)
    monkeypatch.setattr(arguments, "print_rank_0", lambda *_: None)
    monkeypatch.setattr(arguments, "warn_rank_0", lambda *_: None)
    return monkeypatch


def validated(contract, monkeypatch):
    """Through validate_args and the model's configuration, in the contract's environment, on its device."""
    device = DEVICES[contract.profile.device]
    # on a CPU nam56r.megatron.patches answers so that Megatron doesn't ask for a CUDA variable
    arch = device.capability[0] if device.capability else 10
    monkeypatch.setattr(arguments, "get_device_arch_version", lambda: arch)
    for name in (*os.environ,):
        if purpose(name):
            monkeypatch.delenv(name)
    for name, value in contract.fixed_policy.environment.items():
        monkeypatch.setenv(name, value)
    args = arguments.validate_args(parsed(contract))
    return args, core_transformer_config_from_args(args)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(launch=fitting_launches("pretrain"))
def test_accepted_flags_are_megatrons_and_have_the_profile_s_values(launch, megatron):
    recipe, profile = launch
    contract = contract_of(recipe, profile)
    assert contract.accepted, contract.refused
    p, (args, config) = contract.profile, validated(contract, megatron)
    assert config.tensor_model_parallel_size == args.tensor_model_parallel_size == p.tp
    assert config.sequence_parallel == (p.tp > 1)
    assert config.pipeline_model_parallel_size == p.pp and (args.virtual_pipeline_model_parallel_size or 1) == p.vpp
    assert config.expert_model_parallel_size == p.ep and config.expert_tensor_parallel_size == 1
    assert args.context_parallel_size == p.cp and args.data_parallel_size == contract.fixed_policy.parallel.dp
    assert (args.micro_batch_size, args.global_batch_size) == (p.micro_batch, p.global_batch)
    assert args.cuda_graph_impl == config.cuda_graph_impl == p.cuda_graphs
    assert args.recompute_granularity == (None if p.recompute == "none" else "full")
    assert (args.bf16, args.fp16) == (p.precision == "bf16", p.precision == "fp16")
    assert (args.clip_grad, args.loss_scale) == (p.guards.clip_grad, p.guards.loss_scale)
    assert args.check_for_nan_in_loss_and_grad == p.guards.check_nan
    assert args.use_distributed_optimizer == p.distributed_optimizer
    assert {name: getattr(args, name) for name in CPU_ARGUMENTS} == {
        name: value for name, (value, _) in CPU_ARGUMENTS.items()
    }
    assert (args.mtp_num_layers or 0) == p.mtp_depths == contract.fixed_policy.mtp_depths
    assert args.num_layers == p.depth
    assert (args.lr, args.min_lr, args.train_iters) == (RUN.lr, RUN.lr / 10, RUN.steps)
    assert (args.lr_warmup_iters, args.data_path, args.save) == (2, ["data/x"], "runs/a/checkpoints")


def test_the_gpu_presets_pass_megatrons_validation(megatron):
    for name in ("h200", "h200-x2", "h200-x8", "h200-x8-record"):
        contract = contract_of(NAM56R, PROFILES[name], "entry=pretrain")
        assert contract.accepted, contract.refused
        args, config = validated(contract, megatron)
        assert args.bf16 and args.accumulate_allreduce_grads_in_fp32 and args.use_distributed_optimizer
        assert args.moe_token_dispatcher_type == "alltoall" and config.cuda_graph_impl == PROFILES[name].cuda_graphs
    split = contract_of(NAM56R, PROFILES["h200-x2"], "entry=pretrain", "tp=2")
    args, config = validated(split, megatron)
    assert config.sequence_parallel and config.tensor_model_parallel_size == 2
    full = ["cuda_graphs=full_iteration", "recompute=full", "guards.check_nan=false", "entry=pretrain"]
    _, config = validated(contract_of(NAM56R, PROFILES["h200"], *full), megatron)
    assert (config.cuda_graph_impl, config.recompute_granularity) == ("full_iteration", "full")
    half = ["precision=fp16", "guards.loss_scale=1024", "entry=pretrain"]
    args, _ = validated(contract_of(NAM56R, PROFILES["h200"], *half), megatron)
    assert (args.fp16, args.loss_scale, args.check_for_nan_in_loss_and_grad) == (True, 1024.0, True)


MEGATRONS_OWN = [
    (
        "graphs: recompute",
        ["cuda_graphs=local", "recompute=full"],
        "full recompute is only supported with full iteration",
    ),
    ("graphs: NaN check", ["cuda_graphs=full_iteration"], "no-check-for-nan-in-loss-and-grad"),
    ("processes", ["tp=4"], "is not divisible by total_model_size"),
    ("segments", ["pp=2", "layout=AEME|AEME|AEMR"], "evenly divisible by --pipeline-model-parallel-size"),
    ("virtual pipeline", ["vpp=2"], "pipeline-model-parallel size should be greater than 1"),
    ("experts", ["ep=3", "gpus_per_node=3", "global_batch=33"], "Number of experts should be a multiple"),
    ("batch", ["global_batch=33"], "must be divisible by"),
    ("connections", ["tp=2", "environment.CUDA_DEVICE_MAX_CONNECTIONS=8"], "CUDA_DEVICE_MAX_CONNECTIONS to 1"),
]


@pytest.mark.parametrize(("name", "policy", "words"), MEGATRONS_OWN, ids=[case[0] for case in MEGATRONS_OWN])
def test_what_a_check_says_of_megatron_is_so(name, policy, words, megatron):
    contract = contract_of(TINY, PROFILES["h200-x2"], "entry=pretrain", "ep=1", *policy)
    assert name in refused_names(contract)
    with pytest.raises((AssertionError, ValueError), match=re.escape(words)):
        validated(contract, megatron)


def test_fp16_without_a_loss_scale_loses_the_nan_check_in_megatron(megatron):
    contract = contract_of(TINY, PROFILES["h200"], "entry=pretrain", "precision=fp16")
    assert "NaN check" in refused_names(contract)
    args, _ = validated(contract, megatron)
    assert args.check_for_nan_in_loss_and_grad is False


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(launch=fitting_launches("train"))
def test_the_train_entry_s_flags_are_its_own(launch):
    from typer.main import get_command

    from nam56r import cli

    recipe, profile = launch
    contract = contract_of(recipe, profile)
    assert contract.accepted, contract.refused
    train = get_command(cli.app).commands["train"]
    words = [*contract.processes.entry_args[1:], *contract.fixed_policy.args, *contract.run_args]
    given_ = train.make_context("train", [str(word) for word in words]).params
    p = contract.profile
    assert (given_["tp"], given_["ep"], p.pp, p.vpp, p.cp) == (p.tp, p.ep, 1, 1, 1)
    assert (given_["micro_batch"], given_["global_batch"]) == (p.micro_batch, p.global_batch)
    assert given_["clip_grad"] == p.guards.clip_grad
    assert (given_["recipe"], given_["device"], given_["steps"]) == ("runs/a/recipe.yaml", "cpu", 40)
    assert given_["kernel"] == [f"{operator}={name}" for operator, name in p.kernels.items()]
    assert not set(contract.generated_native_args) & set(words) - {"1"} - {
        word for word in words if not word.startswith("-")
    }


def test_a_contract_comes_back_from_its_file(tmp_path):
    for profile in ("cpu", "h200-x8"):
        contract = contract_of(TINY, PROFILES[profile])
        contract.save(tmp_path / "contract.json")
        assert LaunchContract.load(tmp_path / "contract.json") == contract
    (tmp_path / "contract.json").write_text("{}")
    with pytest.raises(ValueError, match="contract.json is no launch contract: recipe: Field required"):
        LaunchContract.load(tmp_path / "contract.json")


def test_a_recipe_that_disagrees_with_itself_never_gets_here():
    with pytest.raises(ValueError):
        Recipe.load("nam56r-tiny").with_overrides(["dsa.ranks=[99]"])
