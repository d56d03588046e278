"""Recipes: presets, rules, YAML, overrides, and the parameters they imply."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nam56r.parameters import FAMILIES, layer, parameters
from nam56r.recipe import DSA, M2RNN, PRESETS, Mamba, MoE, Recipe

NAM56R, TINY = PRESETS["nam56r"], PRESETS["nam56r-tiny"]


def test_presets_have_the_published_geometry():
    assert NAM56R.layers.counts == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert NAM56R.sparse_layers == (5, 9, 13, 21, 25, 29, 37, 41, 45)
    assert [n for n, role in enumerate(NAM56R.roles, 1) if role == "mla"] == [1, 17, 33, 49]
    assert {name: r.mamba_heads for name, r in PRESETS.items()} == {
        "nam56r": 128,
        "nam56r-3584": 112,
        "nam56r-quarter": 128,
        "nam56r-tiny": 8,
    }
    assert all(r.m2rnn.num_heads == r.hidden_size // 80 for r in PRESETS.values())
    assert PRESETS["nam56r-quarter"].sparse_layers == (5, 9, 13)


def test_tiny_has_one_of_everything():
    assert TINY.layers.layers == "AEMEAEMEAEMR"
    assert set(TINY.roles) == {"mla", "dsa", "moe", "mamba3", "m2rnn"}
    assert len(TINY.sparse_layers) == 1
    assert TINY.mtp.num_depths == 1


def test_parameters_of_nam56r():
    assert layer(NAM56R, 12)["in_proj"] == (1811, 4096)
    assert layer(NAM56R, 3)["in_proj"] == (2 * 8192 + 2 * 4 * 8 * 128 + 3 * 128 + 32, 4096)
    assert layer(NAM56R, 1)["linear_kv_down_proj"] == (128, 4096)
    assert "linear_wk" in layer(NAM56R, 5) and "linear_wk" not in layer(NAM56R, 1)
    counts = parameters(NAM56R)
    assert tuple(counts) == FAMILIES
    # Written out from the block's description, without the module.
    mla = 64 * 4096 + 64 + 4096 * 64 + 128 * 4096 + 64 + 4096 * 64 + 4096 * 2048
    indexer = 2048 * 64 + 64 * 4096 + 2 * 64 + 32 * 4096
    assert counts["attention"] == (13 * mla + 9 * indexer,) * 2
    moe = 16 * 4096 + 16 * 2 * 896 * 4096 + 3 * 1024 * 4096
    assert counts["moe"] == (22 * moe, 22 * (moe - 12 * 2 * 896 * 4096))
    mamba = 24992 * 4096 + 2 * 128 + 2 * 128 + 2 * 128 * 4 * 128 + 3 * 128 * 4 * 64 + 8192 * 4096
    assert counts["mamba"] == (13 * mamba,) * 2
    m2rnn = 1811 * 4096 + 944 * 4 + 3 * 51 + 51 * 256 + 816 + 816 * 4096
    assert counts["m2rnn"] == (4 * m2rnn,) * 2
    mtp = 3 * 4096 + 2 * 4096 * 4096 + 2 * 4096 + mla + 3 * 21504 * 4096
    assert counts["mtp"] == (2 * mtp,) * 2
    assert counts["embedding"] == (131072 * 4096, 4096)
    assert counts["head"] == (131072 * 4096,) * 2
    assert counts["norm"] == (53 * 4096,) * 2


def test_parameters_follow_the_recipe():
    siso = TINY.with_overrides(["mamba.mimo_rank=1"])
    assert "mimo_psi" in layer(TINY, 3) and "mimo_psi" not in layer(siso, 3)
    stock = TINY.with_overrides(["mamba.kind=mamba2"])
    assert layer(stock, 3)["conv1d_weight"] == (512 + 2 * 2 * 32, 4)
    shared = NAM56R.with_overrides(["dsa.share_every=3"])
    assert shared.indexer_layers == (5, 21, 37)
    assert shared.index_sources == {5: 5, 9: 5, 13: 5, 21: 21, 25: 21, 29: 21, 37: 37, 41: 37, 45: 37}
    assert shared.shares_indices and not NAM56R.shares_indices
    assert NAM56R.index_sources == {layer: layer for layer in NAM56R.sparse_layers}
    assert "linear_wk" not in layer(shared, 9)
    assert parameters(TINY.with_overrides(["mtp.num_depths=0"]))["mtp"] == (0, 0)
    without = Recipe(name="x", pattern="A", depth=2)
    assert parameters(without)["m2rnn"] == (0, 0)


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_yaml_gives_the_same_recipe(recipe, tmp_path):
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert Recipe.load(recipe.name) == recipe


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.builds(
        dict,
        depth=st.integers(1, 60),
        norm_eps=st.floats(1e-12, 1e-2),
        moe=st.builds(MoE, num_experts=st.integers(4, 64)),
        m2rnn=st.builds(M2RNN, num_heads=st.integers(1, 99)),
        mamba=st.builds(Mamba, d_state=st.integers(1, 64).map(lambda n: 4 * n), mimo_rank=st.integers(1, 8)),
        features=st.dictionaries(st.sampled_from(["engram", "mod"]), st.tuples(st.integers(1, 9))),
    )
)
def test_yaml_gives_any_recipe_back(values, tmp_path):
    recipe = Recipe(name="any", **values)
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_a_frozen_recipe_stays():
    with pytest.raises(ValueError, match="frozen"):
        NAM56R.depth = 13


def test_overrides():
    changed = TINY.with_overrides(
        ["mla.kv_lora_rank=16", "dsa.ranks=[0, 2]", "norm_eps=1e-6", "features.engram=[1]", "depth = 24"]
    )
    assert (changed.mla.kv_lora_rank, changed.dsa.ranks, changed.norm_eps, changed.depth) == (16, (0, 2), 1e-6, 24)
    assert changed.features == {"engram": (1,)}
    assert TINY.mla.kv_lora_rank == 32
    assert changed.differences(TINY)[0] == "depth: 24 here, 12 there"
    assert "features.engram: (1,) here, None there" in changed.differences(TINY)
    assert TINY.differences(TINY) == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mla.kv_lora_rnk=32", "unknown key mla.kv_lora_rnk: the nearest is mla.kv_lora_rank"),
        ("kv_lora_rank=32", "unknown key kv_lora_rank: the nearest is mla.kv_lora_rank"),
        ("depth.x=1", "unknown key depth.x"),
        ("mla.num_heads.x=1", "unknown key mla.num_heads.x"),
        ("=1", "unknown key"),
        ("depth", "must be key=value"),
        ("mla={num_heads: 2}", "mla is a section: set one of mla.num_heads"),
        ("depth=[1", "no YAML"),
        ("depth=ten", "depth = 'ten': must be a valid integer"),
        ("depth=true", "depth = True: must be a valid integer"),
        ("depth=1.5", "depth = 1.5"),
        ("depth=0", "depth = 0: must be greater than or equal to 1"),
        ("norm_eps=.nan", "norm_eps = nan"),
        ("pattern=AEXR", "unknown character 'X' at position 3"),
        ("pattern=AEME|AEMR", "spells 8 layers, but depth is 12"),
        ("pattern=AEMR/+-/+-", r"must be /\+- for mtp.num_depths = 1"),
        ("moe.top_k=5", "moe.top_k = 5, but there are moe.num_experts = 4"),
        ("dsa.ranks=[3]", r"dsa.ranks = \[3\], but the pattern has 3 A slots: only 0 to 2 can be sparse"),
        ("dsa.ranks=[2,1]", r"write \[1, 2\]"),
        ("dsa.ranks=[-1]", "dsa.ranks.0 = -1"),
        ("dsa.index_head_dim=16", "make it at least that"),
        ("mla.qk_rope_head_dim=31", "make it even"),
        ("mamba.headdim=48", "must divide mamba.expand"),
        ("mamba.ngroups=3", "must divide the 8 heads"),
        ("mamba.d_state=30", "make it a multiple of 4"),
        ("mamba.kind=mamba4", "mamba.kind = 'mamba4': must be 'mamba3' or 'mamba2'"),
        ("m2rnn.conv_width=5", "m2rnn.conv_width = 5: must be less than or equal to 4"),
        ("mtp.num_depths=256", "must be less than seq_length = 256"),
        ("features.engram=1", "features.engram = 1: must be a valid tuple"),
        ("features=[1]", "features = "),
    ],
)
def test_refuses_an_override_in_one_line(setting, message):
    with pytest.raises(ValueError, match=message) as caught:
        TINY.with_overrides([setting])
    assert "\n" not in str(caught.value)


def test_names_every_fault_at_once():
    with pytest.raises(ValueError, match="recipe x: mamba.d_state = 6, .*; moe.top_k = 9, "):
        Recipe(name="x", moe=MoE(num_experts=8, top_k=9), mamba=Mamba(d_state=6))
    with pytest.raises(ValueError, match="recipe x: depth = 0: .*; mla.num_heads = 0: "):
        Recipe(name="x", depth=0, mla={"num_heads": 0})


def test_no_attention_has_no_sparse_ranks():
    with pytest.raises(ValueError, match="has 0 A slots: none can be sparse"):
        Recipe(name="x", pattern="EM", depth=4, dsa=DSA(ranks=(0,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nhiden_size: 4", "unknown key hiden_size: the nearest is hidden_size"),
        ("name: x\nmla: {heads: 4}", "unknown key mla.heads"),
        ("depth: 4", "recipe without a name: name is missing"),
        ("name: [", "is no YAML"),
        ("- 1", "must be a YAML mapping"),
        ("1: 2", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("name: x\nmla: 4", "mla = 4"),
    ],
)
def test_refuses_a_file_in_one_line(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'nam56': no such file, and the presets are nam56r, "):
        Recipe.load("nam56")
    with pytest.raises(ValueError, match="can't be read"):
        Recipe.load(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="can't be read"):
        Recipe.load(tmp_path / "r.yaml")


@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda x: st.dictionaries(st.sampled_from("name mla dsa ranks depth features pattern".split()), x, max_size=4),
    )
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_yaml_is_a_recipe_or_one_line(tmp_path, values):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    try:
        Recipe.load(tmp_path / "r.yaml")
    except ValueError as error:
        assert "\n" not in str(error)
