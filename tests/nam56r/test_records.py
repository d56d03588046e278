"""What every record shares: one line for all that is wrong, and reading what can't be trusted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nam56r.launch import LauncherProfile
from nam56r.recipe import Recipe
from nam56r.records import Frozen, explained, load_json, shown, unknown


class Inner(Frozen):
    width: int = 1


class Outer(Frozen):
    name: str
    inner: Inner = Inner()
    open: dict[str, int] = {}


@given(st.text() | st.integers() | st.recursive(st.none(), st.lists, max_leaves=3))
def test_what_an_error_shows_is_one_short_line(value):
    assert shown(value).isprintable() and len(shown(value)) <= 100


def test_an_error_shows_what_python_can_not_print():
    assert shown(10**5000) == "int too large to print"
    assert shown("x" * 5000).endswith("… (5002 characters)")


def test_every_fault_is_explained_in_one_line():
    with pytest.raises(ValueError) as caught, explained(Outer, "thing"):
        Outer(inner={"width": "w\n", "wdth": 1}, opn={}, open={"a\nb": None})
    assert not isinstance(caught.value, ValidationError) and caught.value.__cause__ is None
    assert str(caught.value).split("; ") == [
        "thing: name is missing",
        r"inner.width = 'w\n': must be a valid integer, unable to parse string as an integer",
        "unknown key inner.wdth: the nearest is inner.width",
        r"open.a\nb = None: must be a valid integer",
        "unknown key opn: the nearest is open",
    ]


@given(st.text(max_size=300))
def test_an_unknown_key_is_answered_with_one_that_is_there(key):
    said, near = unknown(Outer, key).rsplit(" ", 1)
    assert near in ("name", "inner.width", "open") and said.isprintable() and len(said) < 500


@pytest.mark.parametrize("cls", [Recipe, LauncherProfile])
def test_no_key_is_taken_for_an_argument_of_python(cls):
    with pytest.raises(ValueError, match="unknown key self: "):
        cls(self=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is no thing: the file: Invalid JSON"),
        (b"{", "is no thing: the file: Invalid JSON"),
        (b"[]", "is no thing: the file: Input should be an object"),
        (b'{"name": "x", "inner": {"width": []}}', "is no thing: inner.width: Input should be a valid integer"),
    ],
)
def test_what_is_no_record_names_the_file(tmp_path, content, message):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_json(Outer, tmp_path / "r.json", "no thing")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_json_gives_the_same_record(tmp_path):
    record = Outer(name="é", inner=Inner(width=3), open={"a": 1})
    (tmp_path / "r.json").write_text(record.model_dump_json(), encoding="utf-8")
    assert load_json(Outer, tmp_path / "r.json", "no thing") == record
