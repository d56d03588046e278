"""Text and code files into a data set: every file is one document, with the end-of-document token at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nam56r.data.dataset import Manifest, paths_of, sha256
from nam56r.data.files import Found, find, shown
from nam56r.data.tokenizer import BYTE_LEVEL, Tokenizer

MAX_FILE_BYTES = 4 * 2**20


def build(
    paths: Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer: Tokenizer = BYTE_LEVEL,
    include: Sequence[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    limit_bytes: int | None = None,
    max_tokens: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json; give the manifest.

    paths           files and folders; see `nam56r.data.files.find` for the order and for what is skipped
    include         globs; none takes every file
    limit_bytes     stop before the file that would take the text past so many bytes
    max_tokens      stop before the file that would take the data set past so many tokens
    force           replace a data set that is there, and Megatron's index cache of it
    progress        called with bytes of text done and in all after every file
    Files that are binary (a NUL byte, or not UTF-8) or unreadable are skipped and named in the manifest.
    All is written in a folder beside PREFIX and moved at the end, PREFIX.json last.
    Raises ValueError when a path is missing, nothing is left to write, PREFIX exists, or the tokenizer gives an id
    that its vocabulary does not have.
    """
    if not paths:
        raise ValueError("no path given: name at least one file or folder")
    for name, value in (("max_file_bytes", max_file_bytes), ("limit_bytes", limit_bytes), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    prefix = Path(prefix)
    if not prefix.name:
        raise ValueError(f"the output prefix is {str(prefix)!r}, but must end in a name")
    targets = paths_of(prefix)
    there = [str(path) for path in targets if path.exists()]
    if there and not force:
        raise ValueError(f"{there[0]} is already there: --force replaces it")
    found = find(paths, include=include, max_file_bytes=max_file_bytes, exclude=targets)
    if tokenizer.model and os.path.exists(tokenizer.model):
        tokenizer = Tokenizer(type=tokenizer.type, model=os.path.realpath(tokenizer.model))

    with _staging(prefix) as folder:
        staged = paths_of(folder / prefix.name)
        facts = _write(found, folder / prefix.name, tokenizer, limit_bytes, max_tokens, progress)
        manifest = Manifest(paths=tuple(map(shown, paths)), include=tuple(include), **facts)
        staged[2].write_text(manifest.model_dump_json(indent=1) + "\n")
        targets[2].unlink(missing_ok=True)
        shutil.rmtree(prefix / "cache" / "GPTDataset_indices", ignore_errors=True)
        for source, target in zip(staged, targets, strict=True):
            source.replace(target)
    return manifest


@contextlib.contextmanager
def _staging(prefix: Path) -> Iterator[Path]:
    """A folder beside PREFIX that is gone afterwards; on failure so are the parents made for it."""
    made = [folder for folder in prefix.parents if not folder.exists()]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
            yield Path(folder)
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _write(
    found: Found,
    prefix: Path,
    spec: Tokenizer,
    limit_bytes: int | None,
    max_tokens: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write PREFIX.bin and PREFIX.idx; give what the manifest says of them."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = spec.load()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    binary, index, _ = paths_of(prefix)
    builder = IndexedDatasetBuilder(str(binary), dtype=dtype)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    extensions: Counter[str] = Counter()
    skipped, stopped_before = dict(found.skipped), None
    tokens = text_bytes = done = 0
    total = sum(size for _, size in found.files)
    for path, size in found.files:
        done += size
        text, reason = _read(path)
        if reason:
            skipped[shown(path)] = reason
            continue
        ids = np.array([*tokenizer.tokenize(text), tokenizer.eod], np.int64)
        if len(ids) == 1:
            skipped[shown(path)] = "no tokens"
            continue
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            bad = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
            raise ValueError(
                f"{spec.type} gives id {bad} for {shown(path)}, but its vocabulary has {tokenizer.vocab_size}"
            )
        size = len(text.encode())
        over_bytes = limit_bytes is not None and text_bytes + size > limit_bytes
        if over_bytes or (max_tokens is not None and tokens + len(ids) > max_tokens):
            stopped_before = shown(path)
            break
        builder.add_document(ids, [len(ids)])
        counts += np.bincount(ids, minlength=len(counts))
        extensions[path.suffix or "(none)"] += 1
        tokens, text_bytes = tokens + len(ids), text_bytes + size
        if progress:
            progress(done, total)
    builder.finalize(str(index))
    reasons = Counter(skipped.values())
    if not tokens:
        over = [f"{stopped_before} alone is over the limit"] if stopped_before else []
        unasked = [f"{found.not_included} not included"] if found.not_included else []
        why = "; ".join([*over, *unasked, *(f"{count} skipped ({reason})" for reason, count in reasons.items())])
        raise ValueError(f"no file to put into a data set: {why or 'the folders are empty'}")
    return {
        "tokenizer": spec,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "dtype": dtype.__name__,
        "documents": len(builder.sequence_lengths),
        "tokens": tokens,
        "longest": max(builder.sequence_lengths),
        "shortest": min(builder.sequence_lengths),
        "text_bytes": text_bytes,
        "unigram_entropy": _entropy(counts),
        "sha256": sha256(binary),
        "not_included": found.not_included,
        "stopped_before": stopped_before,
        "extensions": dict(extensions.most_common()),
        "skipped_reasons": dict(reasons.most_common()),
        "skipped": skipped,
    }


def _read(path: Path) -> tuple[str, str | None]:
    """A file's text, or why it has none."""
    try:
        data = path.read_bytes()
        # a NUL would also read as the byte-level tokenizer's end of document
        return (data.decode(), None) if b"\0" not in data else ("", "binary (a NUL byte)")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except OSError as error:
        return "", f"unreadable: {error.strerror}"


def _entropy(counts: np.ndarray) -> float:
    """Of the distribution the counts give, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
