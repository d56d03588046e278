"""A run's folder: what is in it, and how it stays whole when the run is killed at any moment.

    recipe.yaml, options.json, plan.json    what the run is; options.json is written last: with it there is a run
    metrics.jsonl                           one line a step
    loss.png
    index/                                  the data set's shuffled indices
    checkpoints/step_00000100               whole checkpoints; those being written or removed end in .tmp
    checkpoints/latest                      the name of the newest whole one

Files are replaced, never rewritten. A checkpoint is written as .tmp, flushed to the disk, renamed, and only then named
in `latest`: what `latest` doesn't name, or a newer one than it names, is left from a run that was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nam56r.plan import Plan
from nam56r.recipe import Recipe
from nam56r.train.options import CHANGEABLE


class RunFolder:
    def __init__(self, path: Path):
        self.path = path
        self.plot, self.index = path / "loss.png", path / "index"
        self._options, self._recipe = path / "options.json", path / "recipe.yaml"
        self._metrics, self._checkpoints = path / "metrics.jsonl", path / "checkpoints"
        self._latest = self._checkpoints / "latest"

    def check(self, recipe: Recipe, record: dict[str, Any], *, resume: bool) -> None:
        """Whether the run can start, or go on, here. Changes nothing.

        Raises ValueError: a run is there already; none is there to resume; what is there is of another recipe, data
        set or setting (each difference is named).
        """
        if not resume:
            if self._options.exists() or self._latest.exists():
                raise ValueError(f"{self.path} has a run already: continue it with --resume, or choose another --out")
            return
        if not self._options.exists():
            raise ValueError(
                f"nothing to resume in {self.path}: no run was started there; leave --resume out to start one"
            )
        differences = list(recipe.differences(Recipe.load(self._recipe)))
        if differences:
            raise ValueError(f"{self.path} is a run of another recipe: {'; '.join(differences)}")
        there = json.loads(self._options.read_text(encoding="utf-8"))
        for key in sorted((there.keys() | record.keys()) - CHANGEABLE):
            if there.get(key) != record.get(key):
                differences.append(f"{key}: {record.get(key)} here, {there.get(key)} there")
        if differences:
            raise ValueError(f"{self.path} was started otherwise: {'; '.join(differences)}")

    def open(self, recipe: Recipe, record: dict[str, Any], plan: Plan) -> int:
        """Make or clean the folder, after `check`; the step it is at.

        What a killed run left half-written is removed, and metrics.jsonl goes back to the newest whole checkpoint.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        step = self.step
        for found in self._checkpoints.iterdir():
            if found.suffix == ".tmp" or (found.is_dir() and _step(found.name) > step):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self._metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        _replace(self._metrics, "".join(line for line in whole if json.loads(line)["step"] <= step))
        _replace(self._recipe, recipe.save)
        _replace(self.path / "plan.json", plan.save)
        _replace(self._options, json.dumps(record, indent=1) + "\n")
        return step

    @property
    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        if not self._latest.exists():
            return None
        found = self._checkpoints / self._latest.read_text(encoding="utf-8").strip()
        if not found.is_dir():
            raise ValueError(f"{self._latest} names {found.name}, which is not there: name another one in it")
        return found

    @property
    def step(self) -> int:
        """Steps in the newest whole checkpoint; 0 without one."""
        return _step(self.latest.name) if self.latest else 0

    def log(self, metrics: dict[str, Any]) -> None:
        """Add a step's line to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every step's line."""
        return [json.loads(line) for line in self._metrics.read_text(encoding="utf-8").splitlines()]

    def unfinished(self, step: int) -> Path:
        """Where the checkpoint of a step is written until `commit`."""
        return self._checkpoints / f"step_{step:08d}.tmp"

    def commit(self, step: int, keep: int) -> None:
        """Make what is in `unfinished` the newest checkpoint, and remove all but the newest `keep`."""
        unfinished = self.unfinished(step)
        whole = unfinished.with_suffix("")
        for written in (self._metrics, *unfinished.iterdir(), unfinished):
            _flush(written)
        unfinished.rename(whole)
        _flush(self._checkpoints)
        _replace(self._latest, whole.name + "\n")
        old = sorted(found for found in self._checkpoints.glob("step_*") if found.suffix != ".tmp")[:-keep]
        for found in old:
            shutil.rmtree(found.rename(found.with_suffix(".tmp")))


def _step(name: str) -> int:
    return int(name.removeprefix("step_").removesuffix(".tmp"))


def _replace(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write a file, a text or what a function writes, so that it is always the old one or the new one, whole."""
    new = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        new.write_text(content, encoding="utf-8")
    else:
        content(new)
    _flush(new)
    new.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file's or a folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
