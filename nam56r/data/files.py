"""Which files of which folders become documents, in an order that is the same every time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

# what tools build or install; hidden folders (.git, .venv, caches) are skipped as well
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages", "venv", "build", "dist", "CMakeFiles", "*.egg-info")


@dataclass
class Found:
    """Files to read with their sizes in bytes, in order; what was skipped and why; how many no glob asked for."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    not_included: int = 0


def shown(path: str | Path) -> str:
    """A path as text that can be printed and stored, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find(
    paths: Sequence[str | Path],
    *,
    include: Sequence[str] = (),
    max_file_bytes: int,
    exclude: Iterable[Path] = (),
) -> Found:
    """Walk the paths in the order given, each folder's files before its sub-folders, both sorted by name.

    include  globs over a file's name or its path below the folder given; none takes every file
    exclude  files that are skipped (the output itself)
    Hidden files and folders, SKIPPED_FOLDERS and symbolic links are skipped unless they are one of `paths`.
    Raises ValueError when a path does not exist.
    """
    missing = [shown(path) for path in paths if not os.path.exists(path)]
    if missing:
        raise ValueError(f"no such file or folder: {', '.join(missing)}")
    found, seen = Found(), set()
    outputs = {os.path.realpath(path) for path in exclude}

    def consider(path: Path) -> None:
        real = os.path.realpath(path)
        try:
            status = os.stat(path)
        except OSError as error:
            found.skipped[shown(path)] = f"unreadable: {error.strerror}"
            return
        if real in outputs:
            found.skipped[shown(path)] = "the data set itself"
        elif real in seen:
            found.skipped.setdefault(shown(path), "already taken")
        elif not stat.S_ISREG(status.st_mode):
            found.skipped[shown(path)] = "not a regular file"
        elif status.st_size == 0:
            found.skipped[shown(path)] = "empty"
        elif status.st_size > max_file_bytes:
            found.skipped[shown(path)] = "over --max-file-bytes"
        else:
            seen.add(real)
            found.files.append((path, status.st_size))

    for top in map(Path, paths):
        if not top.is_dir():
            consider(top)
            continue

        def unreadable(error: OSError) -> None:
            found.skipped[shown(error.filename)] = f"unreadable: {error.strerror}"

        for folder, folders, names in os.walk(top, onerror=unreadable):
            for name in sorted(folders):
                reason = _skip_folder(os.path.join(folder, name), name)
                if reason:
                    folders.remove(name)
                    found.skipped[shown(os.path.join(folder, name))] = reason
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                below = path.relative_to(top).as_posix()
                if include and not any(fnmatch(name, glob) or fnmatch(below, glob) for glob in include):
                    found.not_included += 1
                elif path.is_symlink():
                    found.skipped[shown(path)] = "symbolic link"
                elif name.startswith("."):
                    found.skipped[shown(path)] = "hidden"
                else:
                    consider(path)
    return found


def _skip_folder(path: str, name: str) -> str | None:
    if os.path.islink(path):
        return "symbolic link"
    if name.startswith("."):
        return "hidden"
    if any(fnmatch(name, pattern) for pattern in SKIPPED_FOLDERS):
        return "folder skipped by name"
    return None
