"""What lowers to Megatron's symbols, and what stays visible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

from nam56r.recipe import PRESETS, Recipe
from nam56r.translate import TranslationPlan, translate

TINY = PRESETS["nam56r-tiny"]


def test_nam56r():
    plan = translate(PRESETS["nam56r"])
    assert plan.native_pattern == "+EMEDEMEDEMR" + "DEME+EMEDEMR" + "DEMEDEME+EMR" + "DEMEDEMEDEMR" + "+EME" + "/+-/+-"
    assert plan.mtp_suffix == "/+-/+-"
    assert plan.counts == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert [slot.layer for slot in plan.slots if slot.seams == ("R",)] == [12, 24, 36, 48]
    assert [slot.layer for slot in plan.slots if slot.seams == ("M",)] == [
        s.layer for s in plan.slots if s.symbol == "M"
    ]
    assert plan.requires_custom_mamba3 and plan.requires_custom_m2rnn and not plan.fully_native
    assert len(plan.custom_notes) == 2
    assert "layers 12, 24, 36, 48" in plan.custom_notes[1]


def test_r_is_the_only_symbol_megatron_lacks():
    native = translate(TINY).native_pattern
    assert set(native) - Symbols.VALID_LAYERS == {"R", "/"}
    with pytest.raises(ValueError, match="'R' is not a valid layer symbol"):
        parse_hybrid_pattern(native)


def test_without_seams_it_is_fully_native():
    recipe = Recipe(name="x", pattern="AE|ME", depth=4, mamba={"kind": "mamba2"}, mtp={"num_depths": 1})
    plan = translate(recipe)
    assert plan.native_pattern == "+E|ME/+-"
    assert plan.fully_native and plan.custom_notes == ()
    parsed = parse_hybrid_pattern(plan.native_pattern)
    assert (parsed.main_pattern, parsed.mtp_pattern, parsed.mtp_num_depths) == ("+E|ME", "+-", 1)
    assert not translate(recipe.with_overrides(["features.engram=[1]"])).fully_native


def test_faults_of_features_are_refusals():
    plan = translate(TINY.with_overrides(["features.engram=[2]", "features.mimo=[1]"]))
    assert [(r.layer, r.operator) for r in plan.refusals] == [("model", "engram"), (2, "engram"), (1, "mimo")]
    assert plan.slots[1].features == ("moe", "engram")


@given(st.text("AEMR", min_size=1, max_size=9), st.integers(1, 40), st.integers(0, 3))
def test_every_layer_is_translated_by_itself(period, depth, depths):
    recipe = Recipe(name="x", pattern=period, depth=depth, mtp={"num_depths": depths})
    plan = translate(recipe)
    main, *suffixes = plan.native_pattern.split("/")
    assert suffixes == ["+-"] * depths
    assert len(main) == depth == len(plan.slots)
    for slot, native, symbol in zip(plan.slots, main, recipe.layers.layers, strict=True):
        assert slot.native == native == {"A": "+", "E": "E", "M": "M", "R": "R"}[symbol]
    assert TranslationPlan.model_validate_json(plan.model_dump_json()) == plan
