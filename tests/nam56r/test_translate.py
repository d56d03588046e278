"""What lowers to Megatron's symbols, what stays visible, and how `nam56r translate` says it."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from typer.testing import CliRunner

from nam56r import cli
from nam56r.kernels.registry import DEVICES
from nam56r.megatron import specs
from nam56r.parameters import parameters
from nam56r.plan import PlanRefused, make_plan
from nam56r.recipe import PRESETS, Recipe
from nam56r.report import translation as text
from nam56r.translate import STACK_SPEC, TranslationPlan, TranslationRefused, megatron_args, translate
from tests.nam56r.recipes import recipes

NAM56R, TINY = PRESETS["nam56r"], PRESETS["nam56r-tiny"]
NATIVE = {"mla": "+", "dsa": "D", "moe": "E", "mamba3": "M", "mamba2": "M", "m2rnn": "R"}


def call(*words):
    return CliRunner().invoke(cli.app, ["translate", *map(str, words)], prog_name="nam56r", env={"COLUMNS": "80"})


def faults(recipe, **options):
    return {issue.subject: issue.text for issue in translate(recipe, **options).issues if issue.kind == "fault"}


def test_nam56r():
    plan = translate(NAM56R)
    assert plan.native_pattern == "+EMEDEMEDEMR" + "DEME+EMEDEMR" + "DEMEDEME+EMR" + "DEMEDEMEDEMR" + "+EME" + "/+-/+-"
    assert plan.mtp_suffix == "/+-/+-" and plan.source_pattern == "AEMEAEMEAEMR"
    assert plan.counts == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert plan.layers("m2rnn") == (12, 24, 36, 48) and plan.layers("mla") == (1, 17, 33, 49)
    assert [slot.layer for slot in plan.slots if slot.seams == ("R",)] == [12, 24, 36, 48]
    assert [slot.layer for slot in plan.slots if slot.seams == ("M",)] == list(plan.layers("mamba3"))
    assert {slot.rank for slot in plan.slots if slot.role == "dsa"} == {1, 2, 3, 5, 6, 7, 9, 10, 11}
    assert plan.requires_custom_mamba3 and plan.requires_custom_m2rnn and plan.requires_custom_experts
    assert [(issue.subject, issue.kind) for issue in plan.issues] == [
        ("moe", "seam"),
        ("mamba3", "seam"),
        ("m2rnn", "seam"),
    ]
    assert plan.accepted and not plan.fully_native and plan.refusals == ()
    for role in ("moe", "mamba3", "m2rnn"):
        assert any(", ".join(map(str, plan.layers(role))) in note for note in plan.custom_notes)


def test_the_stack_spec_is_there():
    module, name = STACK_SPEC.split()
    assert module == specs.__name__ and hasattr(specs, name)


def test_r_is_the_only_symbol_megatron_lacks(monkeypatch):
    monkeypatch.setattr(Symbols, "VALID_LAYERS", Symbols.VALID_LAYERS - {"R"})  # as it is without our patch
    native = translate(TINY).native_pattern
    assert set(native) - Symbols.VALID_LAYERS == {"R", "/"}
    with pytest.raises(ValueError, match="'R' is not a valid layer symbol"):
        parse_hybrid_pattern(native)


def test_without_seams_it_is_fully_native():
    recipe = Recipe(
        name="x", pattern="AA|MA", depth=4, mamba={"kind": "mamba2"}, mtp={"num_depths": 1}, dsa={"ranks": [1]}
    )
    plan = translate(recipe, strict=True)
    assert plan.native_pattern == "+D|M+/+-"
    assert plan.fully_native and plan.accepted and plan.stack_spec is None and plan.issues == ()
    assert not (plan.requires_custom_mamba3 or plan.requires_custom_m2rnn or plan.requires_custom_experts)
    parsed = parse_hybrid_pattern(plan.native_pattern)
    assert (parsed.main_pattern, parsed.mtp_pattern, parsed.mtp_num_depths) == ("+D|M+", "+-", 1)
    for setting in ("features.engram=[1]", "mamba.kind=mamba3", "pattern=AA|EA", "pattern=AA|RA"):
        assert not translate(recipe.with_overrides([setting])).fully_native


def test_mamba2_is_native_beside_seams():
    recipe = TINY.with_overrides(["mamba.kind=mamba2"])
    plan = translate(recipe)
    assert plan.accepted and plan.stack_spec == STACK_SPEC and not plan.requires_custom_mamba3
    assert [issue.subject for issue in plan.issues] == ["moe", "m2rnn"]
    assert all(slot.native == "M" and slot.seams == () for slot in plan.slots if slot.symbol == "M")
    # our stack spec has an M of either kind, and no flag says which
    assert megatron_args(recipe, plan).args == megatron_args(TINY, translate(TINY)).args
    said = [note for note in plan.custom_notes if note.startswith("mamba2: mamba.kind = mamba2 has no flag")]
    assert len(said) == 1 and "layers 3, 7, 11" in said[0]
    for pattern, noted in {"AM": False, "AMR": True, "AME": True}.items():
        notes = translate(recipe.with_overrides([f"pattern={pattern}"])).custom_notes
        assert any(note.startswith("mamba2") for note in notes) == noted


def test_strict_refuses_every_seam_with_a_remedy_that_works():
    plan = translate(TINY, strict=True)
    assert [refusal.operator for refusal in plan.refusals] == ["moe", "mamba3", "m2rnn"]
    for refusal, remedy in zip(plan.refusals, ("leave E out", "set mamba.kind to mamba2", "leave R out"), strict=True):
        assert remedy in refusal.reasons[0] and "translate without strict" in refusal.reasons[0]
    assert translate(TINY.with_overrides(["pattern=AAMA", "mamba.kind=mamba2"]), strict=True).accepted
    assert translate(TINY).custom_notes == plan.custom_notes


def test_faults_of_features_are_refusals():
    plan = translate(TINY.with_overrides(["features.engram=[0, 2]", "features.mimo=[1]"]))
    assert [(r.layer, r.operator) for r in plan.refusals] == [
        ("model", "engram"),
        (0, "engram"),
        (2, "engram"),
        (1, "mimo"),
    ]
    assert plan.slots[1].features == ("moe", "engram")


def test_moe_off_refuses_e_and_nothing_falls():
    off = TINY.with_overrides(["moe.num_experts=0"])
    assert "moe.num_experts = 0 is MoE off, but layers 2, 4, 6, 8, 10 are E" in faults(off)["moe"]
    assert "set moe.num_experts to at least moe.top_k, or leave E out" in faults(off)["moe"]
    with pytest.raises(PlanRefused, match="moe.num_experts = 0 is MoE off"):
        make_plan(off, DEVICES["cpu"])
    shared_and_router = 5 * 3 * off.moe.shared_ffn_hidden_size * off.hidden_size
    assert parameters(off)["moe"] == (shared_and_router, shared_and_router)
    without = off.with_overrides(["pattern=AMR"])
    assert faults(without) == {}
    assert make_plan(without, DEVICES["cpu"]).accepted


@pytest.mark.parametrize(
    ("settings", "subject", "message"),
    [
        (
            ["mla.rope_theta=0.4"],
            "mla",
            "mla.rope_theta = 0.4, but Megatron's --rotary-base takes whole numbers: set it to 1",
        ),
        (["pattern=R", "dsa.ranks=[]", "mla.rope_theta=0.4"], "mla", "rope_theta"),  # MTP's attention
        (
            ["pattern=AAE", "dsa.ranks=[0,1,2,5,6]", "dsa.share_every=2"],
            "dsa",
            "dsa.share_every = 2 .* set dsa.share_every to 1",
        ),
    ],
)
def test_faults_name_value_rule_and_remedy(settings, subject, message):
    recipe = TINY.with_overrides(settings)
    assert re.search(message, faults(recipe)[subject])
    with pytest.raises(TranslationRefused, match=message):
        megatron_args(recipe, translate(recipe))


def test_a_value_that_nothing_reads_is_no_fault():
    assert faults(TINY.with_overrides(["pattern=EMR", "dsa.ranks=[]", "mtp.num_depths=0", "mla.rope_theta=0.4"])) == {}
    assert faults(TINY.with_overrides(["pattern=AER", "mamba.kind=mamba2", "dsa.share_every=5"])) == {}


def test_layout_places_the_stages_and_nothing_else():
    plan = translate(NAM56R.with_overrides(["depth=12", "dsa.ranks=[1]"]), layout="AEMEA|EMEAEMR/+-/+-")
    assert plan.native_pattern == "+EMED|EME+EMR/+-/+-" and plan.source_pattern == "AEMEAEMEAEMR"
    own = Recipe(name="x", pattern="AE|MR", depth=4)
    assert translate(own).native_pattern == "+E|MR/+-/+-"
    assert translate(own, layout="A|E|MR").native_pattern == "+|E|MR/+-/+-"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            "AEME|AEME",
            "layout 'AEME|AEME' spells 8 layers, but the recipe has 12: write out AEMEAEMEAEMR with | between",
        ),
        ("AEME|AEME|AEME", "has E at layer 12, but the recipe has R"),
        ("", "has no layers"),
        ("AEME||AEMEAEMR", "segment 2 of 3 is empty"),
        ("AEMEAEMEAEMr", "'r' at position 12"),
        ("AEMEAEMEAEMR/+-/+-", "its MTP suffix must be /+-, as mtp.num_depths says, or be left out"),
    ],
)
def test_refuses_a_layout(layout, message):
    with pytest.raises(ValueError) as refused:
        translate(TINY, layout=layout)
    assert message in str(refused.value)


@settings(max_examples=100, deadline=None)
@given(recipe=recipes(), strict=st.booleans())
def test_every_layer_is_translated_by_itself(recipe, strict):
    plan = translate(recipe, strict=strict)
    main, *suffixes = plan.native_pattern.split("/")
    assert suffixes == ["+-"] * recipe.mtp.num_depths
    assert len(main) == recipe.depth == len(plan.slots) == sum(plan.counts.values())
    for slot, native, symbol, role in zip(plan.slots, main, recipe.layers.layers, recipe.roles, strict=True):
        assert slot.native == native == NATIVE[role] and (slot.symbol, slot.role) == (symbol, role)
        assert recipe.layers.numbers(symbol)[slot.rank] == slot.layer
    assert plan.requires_custom_m2rnn == ("R" in main) == any(i.subject == "m2rnn" for i in plan.issues)
    assert plan.accepted == (not plan.refusals) == all(i.kind == "seam" and not strict for i in plan.issues)
    assert plan.fully_native == (plan.issues == ()) and (not plan.fully_native or plan.stack_spec is None)
    assert TranslationPlan.model_validate_json(plan.model_dump_json()) == plan
    for refusal in plan.refusals:
        assert refusal.reasons and all(": " in reason for reason in refusal.reasons)


@settings(max_examples=40, deadline=None)
@given(recipe=recipes(), strict=st.booleans(), width=st.integers(60, 120))
def test_the_text_shows_every_layer_within_the_width(recipe, strict, width):
    plan = translate(recipe, strict=strict)
    shown = text.render(plan, megatron_args(recipe, plan) if plan.accepted else None, width)
    assert max(map(len, shown.splitlines())) <= width
    numbers = [
        int(word)
        for line in shown.splitlines()
        if " → " in line
        for word in line.split("layer")[-1].split()
        if word.isdigit()
    ]
    assert set(numbers) <= set(range(1, recipe.depth + 1))
    words = shown.split()
    for flag in megatron_args(recipe, plan).flags if plan.accepted else ():
        assert flag[0] in words
    assert shown.count("refused: ") == len(plan.refusals)


def test_text_and_exit_codes():
    shown = call("--recipe", "nam56r")
    assert shown.exit_code == 0 and shown.stderr == ""
    assert "13 A (9 sparse), 22 E, 13 M, 4 R; 2 MTP" in shown.stdout
    assert "R m2rnn  → R  layers 12 24 36 48" in shown.stdout and "\x1b" not in shown.stdout
    assert "  --rotary-base 500000\n" in shown.stdout
    refused = call("--recipe", "nam56r-tiny", "--strict", "--set", "moe.num_experts=0", "--set", "features.mhc=[2]")
    assert refused.exit_code == 3 and "flags" not in refused.stdout
    assert refused.stdout.count("refused: ") == 6 and "6 reasons" in refused.stdout
    for words in (["--layout", "AE"], ["--recipe", "nowhere"], ["--set", "depth"]):
        wrong = call(*words)
        assert wrong.exit_code == 2 and wrong.stdout == "" and wrong.stderr.startswith("nam56r: ")
    assert call("--nonsense").exit_code == 2


def test_json_is_the_whole_contract():
    shown = call("--recipe", "nam56r-tiny", "--layout", "AEMEAE|MEAEMR", "--json")
    assert shown.exit_code == 0
    found, plan = json.loads(shown.stdout), translate(TINY, layout="AEMEAE|MEAEMR")
    assert found["args"] == list(megatron_args(TINY, plan).args)
    assert found["custom_notes"] == list(plan.custom_notes)
    assert found["native_pattern"] == "+EMEDE|ME+EMR/+-" and found["stack_spec"] == STACK_SPEC
    assert (found["accepted"], found["fully_native"], found["refusals"]) == (True, False, [])
    assert all(found[f"requires_custom_{part}"] for part in ("mamba3", "m2rnn", "experts"))
    refused = call("--recipe", "nam56r-tiny", "--strict", "--json")
    assert refused.exit_code == 3 and json.loads(refused.stdout)["args"] is None
    assert len(json.loads(refused.stdout)["refusals"]) == 3
