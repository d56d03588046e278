"""The grammar: tiling, counting, numbering, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nam56r.pattern import MAX_DEPTH, SYMBOLS, parse
from nam56r.recipe import Recipe

PERIOD = "AEMEAEMEAEMR"
blocks = st.text(SYMBOLS, min_size=1, max_size=12)


def test_nam56r():
    pattern = parse(PERIOD).tile(52)
    assert pattern.counts == {"A": 13, "E": 22, "M": 13, "R": 4}
    assert pattern.numbers("R") == (12, 24, 36, 48)
    assert pattern.numbers("A") == tuple(range(1, 50, 4))
    assert [pattern.rank(layer) for layer in (1, 5, 17, 49, 12, 48)] == [0, 1, 4, 12, 0, 3]


@given(st.lists(blocks, min_size=1, max_size=4), st.integers(0, 3), st.text("+-", min_size=1, max_size=3))
def test_what_is_read_prints_as_it_was(segments, depths, suffix):
    text = "|".join(segments) + f"/{suffix}" * depths
    pattern = parse(text)
    assert str(pattern) == text
    assert pattern.layers == "".join(segments)
    assert pattern.mtp_depths == depths


@given(blocks, st.integers(1, MAX_DEPTH))
def test_tiling_repeats_the_period_and_every_layer_is_counted_once(period, depth):
    tiled = parse(period).tile(depth)
    assert len(tiled.layers) == depth
    assert all(symbol == period[i % len(period)] for i, symbol in enumerate(tiled.layers))
    assert sum(tiled.counts.values()) == depth
    for symbol, count in tiled.counts.items():
        numbers = tiled.numbers(symbol)
        assert len(numbers) == count
        assert [tiled.rank(n) for n in numbers] == list(range(count))


@given(st.text(SYMBOLS, min_size=12, max_size=12), st.integers(1, MAX_DEPTH))
def test_a_period_of_12_at_a_depth_has_a_role_for_each_layer(period, depth):
    recipe = Recipe(name="x", pattern=period, depth=depth)
    assert len(recipe.roles) == depth
    assert len(parse(period).layers) == 12


def test_stages_and_suffix_outlive_tiling():
    assert str(parse("AEME|AEMR/+-/+-").tile(8)) == "AEME|AEMR/+-/+-"
    assert str(parse("AEMR/+-").tile(6)) == "AEMRAE/+-"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no layers"),
        ("/+-", "has no layers"),
        ("AEXE", "'X' at position 3"),
        ("AEmE", "'m' at position 3"),
        ("A+ME", r"'\+' at position 2"),
        ("A EM", "' ' at position 2"),
        ("АEME", "'А' at position 1"),  # a Cyrillic A
        ("AＥME", "'Ｅ' at position 2"),  # a full-width E
        ("A\u0301EME", "at position 2"),  # a combining acute accent
        ("AEME\n", r"'\\n' at position 5"),
        ("AE\u00a0ME", "at position 3"),
        ("A" * 1025, "spells 1025 layers, but 1024 are the most"),
        ("|".join("A" * 1025), "spells 1025 layers"),
        ("A" + "/+-" * 1025, "spells 1025 MTP depths, but 1024"),
        ("AEM4", "'4' at position 4"),
        ("AEM４", "'４' at position 4"),
        ("AE||ME", "segment 2 of 3 is empty"),
        ("|AE", "segment 1 of 2 is empty"),
        ("AE|", "segment 2 of 2 is empty"),
        ("AEMR/", "MTP depth 1 is empty"),
        ("AEMR/+-/", "MTP depth 2 is empty"),
        ("AEMR/+-/+", "MTP depth 2 is"),
        ("AEMR/+-/AE", "'A' at position 9"),
        ("AEMR/+|-", r"'\|' at position 7"),
        (None, "must be text"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@given(st.text(min_size=1, max_size=8) | st.text("AEMR|/+-aＡ４ \u0301\n", min_size=1, max_size=12))
def test_nothing_outside_the_grammar_passes(text):
    try:
        assert str(parse(text)) == text
    except ValueError as error:
        assert text.isascii() is False or repr(text) in str(error)
    else:
        assert set(text) <= set("AEMR|/+-")


@pytest.mark.parametrize("depth", [0, -1, MAX_DEPTH + 1, 2.0, True, "52"])
def test_refuses_a_depth(depth):
    with pytest.raises(ValueError, match="depth is .* must be a whole number from 1 to 1024"):
        parse(PERIOD).tile(depth)


def test_refuses_a_piped_pattern_of_another_length():
    with pytest.raises(ValueError, match="spells 8 layers, but depth is 16"):
        parse("AEME|AEMR").tile(16)


def test_refuses_a_layer_and_a_symbol_that_are_not_there():
    with pytest.raises(ValueError, match="layers go from 1 to 4"):
        parse("AEMR").rank(0)
    with pytest.raises(ValueError, match="no block symbol"):
        parse("AEMR").numbers("AE")
