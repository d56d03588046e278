"""Anything at all as a recipe file, an override, a pattern or an option: an answer of one line, never a traceback."""

import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nam56r import cli
from nam56r.recipe import PRESETS, Recipe

TINY = PRESETS["nam56r-tiny"]
KEYS = sorted(
    {
        *Recipe.model_fields,
        *(name for section in ("mla", "dsa", "moe", "mtp") for name in getattr(TINY, section).model_dump()),
    }
)
LINES = st.lists(
    st.tuples(
        st.sampled_from(["", "  ", "- ", "? "]),
        st.sampled_from([*KEYS, "self", "<<", "1", "é", '"', "&a x", "*a"]) | st.text(max_size=5),
        st.sampled_from([": ", ":", " "]),
        st.sampled_from(
            "1 -1 0 1.5 1e-5 .nan .inf -.inf true no ~ A AEMR [] {} [1] *a &a [ { | > !!bool !!int !!set".split()
        )
        | st.sampled_from(
            [
                "!!bool x",
                "!!int x",
                "!!float x",
                "!!timestamp x",
                "2001-99-99",
                "0b_",
                "0x_",
                "1:99",
                "!!python/object:os.system x",
            ]
        )
        | st.integers().map(str)
        | st.text(max_size=8),
    ).map("".join),
    max_size=8,
).map("\n".join)


def answer(make):
    """A recipe, or the ValueError's one line."""
    try:
        made = make()
    except ValueError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) < 3000, text
        return text
    assert isinstance(made, Recipe)
    return made


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | LINES.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_recipe_or_one_line(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    answer(lambda: Recipe.load(tmp_path / "r.yaml"))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**64, 10**400, float("inf"), float("-inf"), float("nan"), -0.0, 1e308])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from([*KEYS, "self"]), VALUES, max_size=5))
def test_any_values_are_a_recipe_or_one_line(tmp_path, values):
    answer(lambda: Recipe(**values))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "x"} | values), encoding="utf-8")
    answer(lambda: Recipe.load(tmp_path / "r.yaml"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(max_size=20)
        | st.tuples(
            st.sampled_from([*KEYS, "mla.num_heads", "dsa.ranks", "features.mla", "features", "mla"]), LINES
        ).map("=".join),
        max_size=3,
    )
)
@example(["depth=? \xa0", "depth="])  # a section of one unprintable key, until the second
def test_any_override_is_a_recipe_or_one_line(overrides):
    answer(lambda: TINY.with_overrides(overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y", "key 'name' is there twice: keep one"),
        ("name: x\nmla:\n  num_heads: 4\n  num_heads: 8", "key 'num_heads' is there twice"),
        ("name: &a x\npattern: *a", r"an alias \(\*\) isn't taken: write the value out"),
        ("name: x\nnorm_eps: .nan", "norm_eps = nan: must be"),
        ("name: x\ninit_std: .inf", "init_std = inf: must be"),
        ("name: x\nnorm_eps: true", "norm_eps = True: must be a number"),
        ("name: x\ndepth: true", "depth = True: must be a valid integer"),
        ("name: x\ndsa: {ranks: [true]}", "dsa.ranks.0 = True: must be a valid integer"),
        ("name: x\nfeatures: {mla: [true]}", "features.mla.0 = True: must be a valid integer"),
        (f"name: x\ndepth: {10**30}", r"depth = 1000000000000000000000000000000: must be less than or equal to"),
        (f"name: x\ndepth: {'9' * 5000}", "is no YAML for a recipe"),
        (f"name: x\ndepth: 0x{'f' * 5000}", "depth = int too large to print"),
        ("name: x\nmtp: {num_depths: 2000000000}\nseq_length: 2147483647", "mtp.num_depths = 2000000000: must be"),
        ("name: x\nself: 1", "unknown key self"),
        ("name: 2001-99-99", "is no YAML for a recipe: month must be in 1..12"),
        ("name: !!bool x", "is no YAML for a recipe"),
        ('name: "a\\nb"', r"name = 'a\\nb': must be 1 to 100 printable characters"),
        ("name: ''", "name = '': must be 1 to 100 printable characters"),
        (f"name: x\npattern: {'A' * 1025}", "spells 1025 layers, but 1024 are the most"),
        ("[" * 90_000, "is nested too deeply"),
        ("- " * 40_000, "is nested too deeply"),
        ("{a: " * 20_000, "is nested too deeply"),
        (f"name: {'x' * 200_000}", "is longer than 100000 characters"),
        ("name: x\n" + "pattern: " + "[" * 20 + "]" * 20, "pattern = "),
    ],
)
def test_refuses_by_name(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        Recipe.load(tmp_path / "r.yaml")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000


def test_a_bomb_of_aliases_takes_no_time(tmp_path):
    levels = [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(30)]
    (tmp_path / "r.yaml").write_text("\n".join(["a0: &a0 [x]", *levels, "name: *a30"]))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="alias"):
        Recipe.load(tmp_path / "r.yaml")
    assert time.perf_counter() - start < 5


PATTERNS = st.text("AEMR|/+-aＡ0 ", max_size=16) | st.text(max_size=6)
SETTINGS = st.tuples(st.sampled_from(KEYS), st.text("AEMR0123[],.-{}:", max_size=6)).map("=".join) | st.text(
    max_size=12
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.sampled_from([*PRESETS, "."]) | st.text(max_size=8),
    changes=st.lists(SETTINGS, max_size=2),
    layout=st.none() | PATTERNS,
    flags=st.sets(st.sampled_from(["--strict", "--json"])),
)
def test_any_options_are_answered(tmp_path, monkeypatch, recipe, changes, layout, flags):
    monkeypatch.chdir(tmp_path)
    words = ["translate", f"--recipe={recipe}", *(f"--set={change}" for change in changes), *flags]
    words += [] if layout is None else [f"--layout={layout}"]
    result = CliRunner().invoke(cli.app, words, prog_name="nam56r")
    assert result.exit_code in (0, 2, 3), (words, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    assert "Traceback" not in result.output
    if result.exit_code == 2:
        assert result.stdout == "" and result.stderr
    else:
        assert result.stderr == "" and result.stdout
