"""Placement: what sits where by itself, and what is refused."""

import re

import pytest

from nam56r.features import FEATURES, global_features, implied, misplaced, on_layer
from nam56r.recipe import PRESETS

TINY = PRESETS["nam56r-tiny"]


def reasons(*settings):
    return [(fault.layer, fault.reason) for fault in misplaced(TINY.with_overrides(settings))]


def test_implied_features_are_never_misplaced():
    assert implied(TINY, 1) == ("mla",)
    assert implied(TINY, 5) == ("mla", "dsa")
    assert implied(TINY, 2) == ("moe",)
    assert implied(TINY, 3) == ("mamba3", "mimo")
    assert implied(TINY.with_overrides(["mamba.mimo_rank=1"]), 3) == ("mamba3",)
    assert implied(TINY.with_overrides(["mamba.kind=mamba2"]), 3) == ("mamba2",)
    assert implied(TINY, 12) == ("m2rnn",)
    assert global_features(TINY) == ("mtp",)
    assert global_features(TINY.with_overrides(["mtp.num_depths=0"])) == ()
    for recipe in (*PRESETS.values(), TINY.with_overrides(["mamba.kind=mamba2"])):
        layers = {}
        for layer in range(1, recipe.depth + 1):
            for name in implied(recipe, layer):
                layers.setdefault(name, []).append(layer)
                assert FEATURES[name].symbol == recipe.layers.layers[layer - 1]
        assert misplaced(recipe) == ()
        assert misplaced(recipe.with_overrides([f"features.{name}={at}" for name, at in layers.items()])) == ()


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if feature.symbol])
def test_a_feature_is_refused_on_every_other_family(name):
    for layer, symbol in enumerate(TINY.layers.layers, 1):
        faults = [why for at, why in reasons(f"features.{name}=[{layer}]") if at == layer]
        if symbol != FEATURES[name].symbol:
            assert len(faults) == 1 and f"{name} belongs on" in faults[0] and f"layer {layer} is {symbol}" in faults[0]
        else:
            assert not any("belongs on" in why for why in faults)


@pytest.mark.parametrize(
    ("setting", "layer", "message"),
    [
        ("features.engram=[1]", None, "engram .* has no implementation"),
        ("features.mhc=[5]", None, "mhc .* has no implementation"),
        ("features.mod=[2]", None, "mod .* has no implementation"),
        ("features.ngram_hash=[]", None, "ngram_hash .* has no implementation"),
        ("features.structure_signals=[]", None, "structure_signals .* has no implementation"),
        ("features.engrm=[1]", None, "unknown feature engrm: the nearest is engram"),
        ("features.mla=[13]", 13, "mla names layer 13, but layers go from 1 to 12"),
        ("features.mla=[0]", 0, "names layer 0"),
        ("features.mla=[-1]", -1, "names layer -1"),
        ("features.dsa=[1]", 1, "dsa is named on layer 1, but the recipe's own fields don't put it there"),
        ("features.mamba2=[3]", 3, "mamba2 is named on layer 3, but the recipe's own fields don't put it there"),
        ("features.mla=[]", None, "mla names no layer"),
        ("features.mtp=[12]", None, r"mtp is global and takes no layers, but has \[12\]"),
    ],
)
def test_refuses(setting, layer, message):
    faults = reasons(setting)
    assert len(faults) == 1
    assert faults[0][0] == layer
    assert re.search(message, faults[0][1])


def test_all_faults_come_at_once():
    assert len(reasons("features.engram=[2, 99]", "features.moe=[1]")) == 4
    assert reasons("features.mtp=[]", "mtp.num_depths=0") == [(None, "mtp is named, but mtp.num_depths is 0")]
    assert on_layer(TINY.with_overrides(["features.engram=[1]"]), 1) == ("mla", "engram")
