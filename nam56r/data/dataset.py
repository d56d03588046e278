"""A data set on disk: Megatron's PREFIX.bin and PREFIX.idx, and PREFIX.json, which says what they hold.

PREFIX.json is written last: without it there is no whole data set.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nam56r.data.tokenizer import Tokenizer
from nam56r.records import Frozen, load_json

# dtype -> Megatron's code in the index header (megatron.core.datasets.indexed_dataset.DType), bytes a token
DTYPES = {"uint16": (8, 2), "int32": (4, 4)}
_HEADER = struct.Struct("<9sQBQQ")


class Manifest(Frozen):
    """PREFIX.json. Every file is one document (and one Megatron sequence) that ends with `eod`."""

    format: Literal[1] = 1
    tokenizer: Tokenizer
    vocab_size: int
    eod: int
    dtype: Literal["uint16", "int32"]
    documents: int
    tokens: int
    longest: int
    shortest: int
    text_bytes: int
    unigram_entropy: float
    sha256: str
    paths: tuple[str, ...]
    include: tuple[str, ...] = ()
    not_included: int = 0
    stopped_before: str | None = None
    extensions: dict[str, int]
    skipped_reasons: dict[str, int]
    skipped: dict[str, str]

    @property
    def bin_bytes(self) -> int:
        return self.tokens * DTYPES[self.dtype][1]

    @property
    def idx_bytes(self) -> int:
        """Header, then per document an int32 length and an int64 offset, then documents + 1 int64 boundaries."""
        return _HEADER.size + 12 * self.documents + 8 * (self.documents + 1)

    @property
    def idx_header(self) -> bytes:
        code = DTYPES[self.dtype][0]
        return _HEADER.pack(b"MMIDIDX\0\0", 1, code, self.documents, self.documents + 1)

    def summary(self, prefix: str | Path) -> str:
        """What a person wants to know, in a few lines."""
        types = [f"{name} {count:,}" for name, count in list(self.extensions.items())[:8]]
        others = len(self.extensions) - len(types)
        lines = [
            f"{prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.text_bytes / 1e6:,.1f} MB of text",
            f"  tokenizer  {self.tokenizer.name}, vocabulary {self.vocab_size:,}, end of document {self.eod}",
            f"  documents  shortest {self.shortest:,} tokens, longest {self.longest:,}",
            f"  unigram    {self.unigram_entropy:.4f} nats a token",
            f"  types      {', '.join(types)}{f' and {others} more' if others else ''}",
        ]
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped_reasons.items())
            lines.append(f"  skipped    {len(self.skipped):,}: {reasons}; named in {prefix}.json")
        if self.not_included:
            lines.append(f"  left out   {self.not_included:,} files that --include doesn't ask for")
        if self.stopped_before:
            lines.append(f"  stopped    at the limit, before {self.stopped_before}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DataInfo:
    """What a trainer needs to know of a whole, consistent data set.

    tokens counts the end-of-document tokens; unigram_entropy is in nats a token: the loss of a model that knows
    only how frequent each token is. sha256 is PREFIX.bin's: key Megatron's index cache with it.
    """

    prefix: str
    tokenizer: Tokenizer
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    unigram_entropy: float
    sha256: str


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """PREFIX.bin, PREFIX.idx, PREFIX.json."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest:
    """PREFIX.json, after checking both files' sizes and the index header against it.

    Raises ValueError, in one line that names the file, when one is missing, truncated or of another data set.
    """
    binary, index, manifest_path = paths_of(prefix)
    missing = [path.name for path in (binary, index, manifest_path) if not path.is_file()]
    if len(missing) == 3:
        raise ValueError(f"no data set at {prefix}: make one with `nam56r data build PATH… --out {prefix}`")
    if missing:
        raise ValueError(f"the data set {prefix} is not whole: {' and '.join(missing)} missing")
    manifest = load_json(Manifest, manifest_path, "not a data set's manifest")
    for path, expected in ((binary, manifest.bin_bytes), (index, manifest.idx_bytes)):
        size = path.stat().st_size
        if size != expected:
            what = "truncated" if size < expected else "too long"
            raise ValueError(f"{path} is {what}: expected {expected} bytes, found {size}")
    with index.open("rb") as stream:
        if stream.read(_HEADER.size) != manifest.idx_header:
            raise ValueError(f"{index} does not belong to {manifest_path}: its header says otherwise")
    return manifest


def read_lengths(prefix: str | Path, manifest: Manifest) -> np.ndarray:
    """Tokens of every document, int64 [documents], after checking all of the index against them (ValueError)."""
    index, count = paths_of(prefix)[1], manifest.documents
    lengths = np.fromfile(index, "<i4", count, offset=_HEADER.size).astype(np.int64)
    offsets = np.fromfile(index, "<i8", count, offset=_HEADER.size + 4 * count)
    boundaries = np.fromfile(index, "<i8", count + 1, offset=_HEADER.size + 12 * count)
    consistent = (
        lengths.sum() == manifest.tokens
        and (lengths > 0).all()
        and np.array_equal(offsets, (np.cumsum(lengths) - lengths) * DTYPES[manifest.dtype][1])
        and np.array_equal(boundaries, np.arange(count + 1))
    )
    if not consistent:
        raise ValueError(f"{index} is damaged: its documents don't lie end to end over {manifest.tokens} tokens")
    return lengths


def open_dataset(prefix: str | Path) -> DataInfo:
    """What is in a data set that `nam56r data build` made.

    Raises ValueError, in one line, when it is missing, truncated or inconsistent.
    """
    manifest = read_manifest(prefix)
    read_lengths(prefix, manifest)
    return DataInfo(
        prefix=str(prefix),
        tokenizer=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        eod=manifest.eod,
        documents=manifest.documents,
        tokens=manifest.tokens,
        unigram_entropy=manifest.unigram_entropy,
        sha256=manifest.sha256,
    )


def verify(prefix: str | Path, manifest: Manifest) -> None:
    """Read all of PREFIX.bin and compare its SHA-256 (ValueError)."""
    binary = paths_of(prefix)[0]
    found = sha256(binary)
    if found != manifest.sha256:
        raise ValueError(f"{binary} is damaged: its SHA-256 is {found}, but was {manifest.sha256} when it was built")


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def texts(prefix: str | Path, manifest: Manifest, count: int, tokens: int = 200) -> Iterator[str]:
    """The first `tokens` tokens of the first `count` documents, as text safe to print."""
    lengths, tokenizer = read_lengths(prefix, manifest)[:count], manifest.tokenizer.load()
    tokens_on_disk = np.memmap(paths_of(prefix)[0], manifest.dtype, "r")
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        ids = tokens_on_disk[end - length : end][:tokens]
        text = tokenizer.detokenize([int(i) for i in ids if i != manifest.eod])
        yield "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
