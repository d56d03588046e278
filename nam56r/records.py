"""Frozen records: their base, what an error says of them in one line, and reading them from YAML, JSON and settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

LONGEST = 100_000  # characters of a YAML file


class Frozen(BaseModel):
    """Plain data that never changes and has no keys but its own. A string below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def shown(value: object) -> str:
    """A value as an error message names it: repr, in one line of at most 100 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python prints no int of more than 4300 digits
        text = f"{type(value).__name__} too large to print"
    return text if len(text) <= 100 else f"{text[:70]}… ({len(text)} characters)"


def unknown(cls: type[BaseModel], key: str) -> str:
    """What an error says of a dotted key that a class hasn't got: the nearest that it has."""
    near = difflib.get_close_matches(key[:100], _keys(cls), 1, 0.0)[0]
    return f"unknown key {_printable(key) if len(key) <= 100 else shown(key)}: the nearest is {near}"


@contextmanager
def explained(cls: type[BaseModel], what: str) -> Iterator[None]:
    """A ValidationError of a class as a ValueError of one line: `what`, then every key at fault, its value, the rule."""
    try:
        yield
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if item["type"] == "extra_forbidden":
                lines.append(unknown(cls, key))
            elif item["type"] == "missing":
                lines.append(f"{key} is missing")
            else:
                lines.append(f"{key} = {shown(item['input'])}: {message}" if key else message)
        raise ValueError(_printable(f"{what}: {'; '.join(lines)}")) from None


def load[R: BaseModel](cls: type[R], kind: str, name_or_path: str | Path, presets: Mapping[str, R]) -> R:
    """A preset by name, or a YAML file by path. Raises ValueError of one line, which calls it by its kind."""
    if str(name_or_path) in presets:
        return presets[str(name_or_path)]
    where = shown(str(name_or_path))
    try:
        with open(name_or_path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        known = ", ".join(presets)
        raise ValueError(f"unknown {kind} {where}: no such file, and the presets are {known}") from None
    except (OSError, ValueError) as error:  # no file, not UTF-8, a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{kind} {where} can't be read: {why}") from None
    try:
        values = _read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{kind} {where} is no YAML for a {kind}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{kind} {where} must be a YAML mapping of the keys {', '.join(cls.model_fields)}")
    return cls(**values)


def as_yaml(record: BaseModel) -> str:
    """Every value as YAML; `load` gives an equal record."""
    return yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save(record: BaseModel, path: str | Path) -> None:
    """Write `as_yaml`."""
    Path(path).write_text(as_yaml(record), encoding="utf-8")


def load_json[R: BaseModel](cls: type[R], path: str | Path, what: str) -> R:
    """A record from JSON. Raises ValueError of one line, "PATH is WHAT: …", at the first fault."""
    try:
        return cls.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is {what}: {where}: {first['msg']}") from None


def assignments(option: str, settings: Iterable[str], example: str) -> Iterator[tuple[str, str, Any]]:
    """Of each "key=value" setting: how an error names it ("--set key=value"), the key, the value read as YAML.

    Raises ValueError of one line.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        said = f"{option} {_printable(setting) if len(setting) <= 1000 else shown(setting)}"
        if not equals:
            raise ValueError(f"{said}: must be key=value, such as {example}")
        try:
            value = _read_yaml(text)
        except ValueError as error:
            raise ValueError(f"{said}: the value is no YAML: {error}") from None
        yield said, key.strip(), value


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of every field, those of its records in their place."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


class _Yaml(yaml.SafeLoader):
    """Safe YAML of which a reader sees every value: no key twice, no aliases (a few nested ones expand to gigabytes)."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > 20:  # PyYAML takes seconds for a few thousand brackets
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("an alias (*) isn't taken: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[-1])
            raise ValueError(f"key {shown(twice)} is there twice: keep one")
        return mapping


def _read_yaml(text: str) -> Any:
    """A YAML document as plain data. Raises ValueError of one line."""
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    try:
        return yaml.load(text, _Yaml)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_printable(f"line {error.problem_mark.line + 1}: {error.problem}")) from None
    except Exception as error:  # YAMLError, and what PyYAML lets through for a value such as !!bool x or 2001-99-99
        raise ValueError(_printable(" ".join(str(error).split())) or type(error).__name__) from None


def _printable(text: str) -> str:
    """Text with the escapes of a Python string for what isn't printable."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
