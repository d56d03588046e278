"""Data sets: what goes in, what is skipped, and that a damaged or half-built one is never taken for a whole one."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

import nam56r.data
from nam56r.data import Tokenizer, build, dataset

COMMAND = [sys.executable, "-W", "ignore", "-m", "nam56r"]


@pytest.fixture
def tree(tmp_path):
    """A folder with text, code and much that is none."""
    files = {
        "b.txt": "second\n",
        "a.py": "print('first')\r\n\n",
        "z/deep.md": "# deep\n",
        "z/empty.py": "",
        "naïve 文字.py": "ключ = '🙂'\n",
        "noext": "plain",
        ".hidden": "secret",
        ".git/config": "[core]",
        "__pycache__/a.py": "cached",
        "pkg.egg-info/PKG-INFO": "Name: pkg",
        "large.txt": "x" * 3000,
    }
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "tree" / "nul.txt").write_bytes(b"text\0more")
    (tmp_path / "tree" / "latin.txt").write_bytes("café".encode("latin-1"))
    return tmp_path / "tree"


def documents(prefix):
    """Every document's bytes without its end-of-document token, which must be there, once."""
    loaded = IndexedDataset(str(prefix))
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in loaded)
    assert list(loaded.document_indices) == list(range(len(loaded) + 1))
    return [bytes(int(i) for i in ids[:-1]) for ids in loaded]


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_takes_text_in_sorted_order_and_names_what_it_skips(tree, tmp_path):
    manifest = build([tree], tmp_path / "out", max_file_bytes=1000)
    expected = ["a.py", "b.txt", "naïve 文字.py", "noext", "z/deep.md"]
    assert documents(tmp_path / "out") == [(tree / name).read_bytes() for name in expected]
    skipped = {str(Path(path).relative_to(tree)): why for path, why in manifest.skipped.items()}
    assert skipped == {
        ".git": "hidden",
        ".hidden": "hidden",
        "__pycache__": "folder skipped by name",
        "pkg.egg-info": "folder skipped by name",
        "large.txt": "over --max-file-bytes",
        "latin.txt": "not UTF-8",
        "nul.txt": "binary (a NUL byte)",
        "z/empty.py": "empty",
    }
    assert manifest.skipped_reasons == dict(Counter(skipped.values()))
    assert manifest.extensions == {".py": 2, ".txt": 1, "(none)": 1, ".md": 1}
    assert manifest.documents == 5
    sizes = [(tree / name).stat().st_size for name in expected]
    assert manifest.tokens == sum(sizes) + 5 and manifest.text_bytes == sum(sizes)
    assert (manifest.longest, manifest.shortest) == (max(sizes) + 1, min(sizes) + 1)


def test_unigram_entropy_is_that_of_the_tokens(tree, tmp_path):
    build([tree], tmp_path / "out")
    tokens = np.fromfile(tmp_path / "out.bin", np.uint16).tolist()
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    assert nam56r.data.open(tmp_path / "out").unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_the_same_files_give_the_same_bits(tree, tmp_path):
    first, second = build([tree], tmp_path / "one"), build([tree], tmp_path / "two")
    assert first == second
    for end in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"two.{end}").read_bytes()


# any text that UTF-8 can hold, NUL apart, which marks a binary file
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and name not in nam56r.data.files.SKIPPED_FOLDERS
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAME, st.one_of(TEXT.map(str.encode), st.binary(max_size=60)), min_size=1, max_size=6))
def test_every_file_is_a_document_or_is_named(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "in").mkdir()
    for name, content in files.items():
        (folder / "in" / name).write_bytes(content)
    good = [content for _, content in sorted(files.items()) if _is_text(content)]
    if not good:
        with pytest.raises(ValueError, match="no file to put into a data set"):
            build([folder / "in"], folder / "out")
        assert listing(folder) == sorted(["in", *(f"in/{name}" for name in files)])
        return
    manifest = build([folder / "in"], folder / "out")
    assert documents(folder / "out") == good
    assert len(manifest.skipped) == len(files) - len(good)
    whole = list(dataset.texts(folder / "out", manifest, len(good), tokens=10_000))
    assert len(whole) == len(good)


def _is_text(content):
    try:
        return bool(content.decode()) and b"\0" not in content
    except UnicodeDecodeError:
        return False


def test_tokens_decode_to_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße,\t世界\nzeile zwei")
    manifest = build([tmp_path / "a.txt"], tmp_path / "out")
    assert list(dataset.texts(tmp_path / "out", manifest, 5)) == ["Grüße,\t世界\nzeile zwei"]


def test_shown_text_cannot_steer_a_terminal(tmp_path):
    (tmp_path / "a.txt").write_text("\x1b[2Jgone")
    manifest = build([tmp_path / "a.txt"], tmp_path / "out")
    assert list(dataset.texts(tmp_path / "out", manifest, 1)) == ["�[2Jgone"]


def test_links_pipes_and_repeats(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real.txt").write_text("once")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "alias.txt").symlink_to(folder / "sub" / "real.txt")
    os.mkfifo(folder / "pipe")
    manifest = build([folder, folder / "sub", folder / "sub" / "real.txt"], tmp_path / "out")
    assert documents(tmp_path / "out") == [b"once"]
    reasons = {Path(path).name: why for path, why in manifest.skipped.items()}
    assert reasons == {
        "loop": "symbolic link",
        "broken": "symbolic link",
        "alias.txt": "symbolic link",
        "pipe": "not a regular file",
        "real.txt": "already taken",
    }


def test_a_path_that_is_named_is_taken_whatever_it_is_called(tmp_path):
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "a.txt").write_text("folder")
    (tmp_path / ".rc").write_text("file")
    (tmp_path / "link").symlink_to(tmp_path / ".rc")
    build([tmp_path / ".config", tmp_path / "link"], tmp_path / "out")
    assert documents(tmp_path / "out") == [b"folder", b"file"]


def test_names_that_are_not_unicode(tmp_path):
    (tmp_path / "in").mkdir()
    folder = os.fsencode(tmp_path / "in")
    for name, content in ((b"bad\xff.txt", b"text"), (b"bin\xfe", b"\0")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    manifest = build([tmp_path / "in"], tmp_path / "out")
    assert documents(tmp_path / "out") == [b"text"]
    assert list(manifest.skipped) == [f"{tmp_path}/in/bin\\xfe"]
    assert nam56r.data.open(tmp_path / "out").documents == 1


def test_unreadable_files_are_named(tree, tmp_path, monkeypatch):
    read = Path.read_bytes

    def denied(path):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    manifest = build([tree], tmp_path / "out")
    assert manifest.skipped[str(tree / "b.txt")] == "unreadable: Permission denied"
    assert b"second\n" not in documents(tmp_path / "out")


def test_include_takes_only_what_it_asks_for(tree, tmp_path):
    manifest = build([tree], tmp_path / "out", include=["*.md", "noext"])
    assert documents(tmp_path / "out") == [b"plain", b"# deep\n"]
    assert manifest.not_included == 8 and set(manifest.skipped.values()) == {"hidden", "folder skipped by name"}


@pytest.mark.parametrize(
    ("limits", "count"), [({"limit_bytes": 20}, 1), ({"max_tokens": 26}, 2), ({"max_tokens": 10**6}, 6)]
)
def test_limits_stop_before_the_file_that_passes_them(tree, tmp_path, limits, count):
    manifest = build([tree], tmp_path / "out", **limits)
    assert manifest.documents == count
    assert manifest.tokens <= limits.get("max_tokens", math.inf)
    assert manifest.text_bytes <= limits.get("limit_bytes", math.inf)
    assert (manifest.stopped_before is None) == (limits == {"max_tokens": 10**6})


def test_the_output_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for _ in range(2):
        build([tmp_path], tmp_path / "out", force=True)
        assert documents(tmp_path / "out") == [b"text"]


class Words:
    """Stands in for a tokenizer with a large vocabulary."""

    def __init__(self, vocab_size):
        self.vocab_size, self.eod = vocab_size, vocab_size - 1

    def tokenize(self, text):
        return [int(word) for word in text.split()]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_536, "int32"), (131_072, "int32")])
def test_the_vocabulary_fits_the_dtype(tmp_path, monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(Tokenizer, "load", lambda self: Words(vocab_size))
    (tmp_path / "a.txt").write_text(f"0 7 {vocab_size - 2}")
    (tmp_path / "blank.txt").write_text(" \n")
    manifest = build([tmp_path], tmp_path / "out")
    assert manifest.dtype == dtype and manifest.skipped == {str(tmp_path / "blank.txt"): "no tokens"}
    loaded = IndexedDataset(str(tmp_path / "out"))
    assert loaded[0].tolist() == [0, 7, vocab_size - 2, vocab_size - 1]
    assert nam56r.data.open(tmp_path / "out").eod == vocab_size - 1


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "load", lambda self: Words(512))
    (tmp_path / "a.txt").write_text("1 512")
    with pytest.raises(ValueError, match=r"gives id 512 for .*a.txt, but its vocabulary has 512"):
        build([tmp_path / "a.txt"], tmp_path / "out")
    assert listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer(type="Morse"), "tokenizer type is 'Morse', but must be one of ByteLevelTokenizer"),
        (Tokenizer(type="HuggingFaceTokenizer"), "HuggingFaceTokenizer needs a model"),
        (Tokenizer(model="x"), "ByteLevelTokenizer takes no model"),
    ],
)
def test_tokenizers_that_cannot_be_loaded(tmp_path, tokenizer, message):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        build([tmp_path], tmp_path / "out", tokenizer=tokenizer)
    assert listing(tmp_path) == ["a.txt"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="SentencePieceTokenizer needs the package sentencepiece, which is not installed"
    ):
        Tokenizer(type="SentencePieceTokenizer", model="m").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "no path given"),
        ({"paths": ["gone", "away"]}, "no such file or folder: gone, away"),
        ({"max_file_bytes": 0}, "max_file_bytes is 0, but must be at least 1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"paths": ["tree"], "include": ["*.rs"]}, "no file to put into a data set: 10 not included"),
        ({"limit_bytes": 3}, "a.py alone is over the limit"),
        ({"prefix": ""}, "the output prefix is '.', but must end in a name"),
    ],
)
def test_bad_input(tree, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(**{"paths": [tree], "prefix": tmp_path / "new" / "out"} | arguments)
    assert listing(tmp_path) == before


def test_an_empty_folder_is_no_data(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no file to put into a data set: the folders are empty"):
        build([tmp_path / "in"], tmp_path / "out")


def test_what_is_there_is_replaced_only_by_force(tree, tmp_path):
    build([tree / "a.py"], tmp_path / "out")
    cached = tmp_path / "out" / "cache" / "GPTDataset_indices" / "stale.npy"
    cached.parent.mkdir(parents=True)
    cached.touch()
    with pytest.raises(ValueError, match=r"out.bin is already there: --force replaces it"):
        build([tree / "b.txt"], tmp_path / "out")
    assert documents(tmp_path / "out") == [b"print('first')\r\n\n"] and cached.exists()
    build([tree / "b.txt"], tmp_path / "out", force=True)
    assert documents(tmp_path / "out") == [b"second\n"]
    assert not cached.exists(), "Megatron would index the new data with the old data's cache"


@pytest.mark.parametrize("size", [0, 1, 40, -1])
@pytest.mark.parametrize("end", ["bin", "idx"])
def test_a_truncated_file_is_named_with_its_sizes(tree, tmp_path, end, size):
    build([tree], tmp_path / "out")
    path = tmp_path / f"out.{end}"
    whole = path.stat().st_size
    os.truncate(path, size if size >= 0 else whole - 1)
    expected = rf"out\.{end} is truncated: expected {whole} bytes, found {path.stat().st_size}$"
    with pytest.raises(ValueError, match=expected):
        nam56r.data.open(tmp_path / "out")


@pytest.mark.parametrize("end", ["bin", "idx", "json"])
def test_a_missing_file_is_named(tree, tmp_path, end):
    build([tree], tmp_path / "out")
    (tmp_path / f"out.{end}").unlink()
    with pytest.raises(ValueError, match=rf"is not whole: out\.{end} missing"):
        nam56r.data.open(tmp_path / "out")


def test_no_data_set_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"no data set at .*nothing: make one with `nam56r data build"):
        nam56r.data.open(tmp_path / "nothing")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', "not json"])
def test_a_foreign_manifest(tree, tmp_path, content):
    build([tree], tmp_path / "out")
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(ValueError, match="is not a data set's manifest") as caught:
        nam56r.data.open(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_longer_or_other_index_is_refused(tree, tmp_path):
    build([tree], tmp_path / "out")
    index = tmp_path / "out.idx"
    whole = index.read_bytes()
    index.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"out\.idx is too long"):
        nam56r.data.open(tmp_path / "out")
    index.write_bytes(b"\1" + whole[1:])
    with pytest.raises(ValueError, match=r"out\.idx does not belong to .*out\.json"):
        nam56r.data.open(tmp_path / "out")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_of_the_index_is_an_error_or_harmless(damaged, place, bit):
    prefix, whole = damaged
    content = bytearray(whole)
    content[place % len(whole)] ^= 1 << bit
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.idx (is damaged|does not belong)"):
        nam56r.data.open(prefix)


@pytest.fixture
def damaged(tree, tmp_path):
    build([tree], tmp_path / "out")
    return tmp_path / "out", (tmp_path / "out.idx").read_bytes()


def test_verify_finds_a_flipped_bit_of_the_data(tree, tmp_path):
    manifest = build([tree], tmp_path / "out")
    dataset.verify(tmp_path / "out", manifest)
    content = bytearray((tmp_path / "out.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "out.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.bin is damaged: its SHA-256"):
        dataset.verify(tmp_path / "out", manifest)


def test_a_failure_while_writing_leaves_nothing(tree, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("nam56r.data.writer.sha256", full)
    before = listing(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        build([tree], tmp_path / "new" / "deep" / "out")
    assert listing(tmp_path) == before


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.txt").write_text("many words " * 300_000)
    before = listing(tmp_path)
    arguments = ["data", "build", str(tmp_path / "in"), "--out", str(tmp_path / "new" / "out")]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "new").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert listing(tmp_path) == before


def test_megatron_trains_from_it(tmp_path):
    """Megatron's own builder gives samples that are windows of the documents, end to end."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number:02}.txt").write_text("".join(f"{number} to {k}\n" for k in range(40)))
    build([tmp_path / "in"], tmp_path / "out")
    info = nam56r.data.open(tmp_path / "out")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([info.prefix], None),
        split="90,10,0",
        tokenizer=info.tokenizer.load(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 0], lambda: True, config).build()
    assert len(train) >= 50 and len(valid) >= 5
    everything = b"".join(content + b"\0" for content in documents(tmp_path / "out"))
    inside = 0
    for sample in (train[k] for k in range(50)):
        assert sample["tokens"].tolist()[1:] == sample["labels"].tolist()[:-1]
        inside += bytes(sample["tokens"].tolist()) in everything
    assert inside > 30, "windows within one document are found whole"
