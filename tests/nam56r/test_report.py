"""The page made of measured results."""

import json

import pytest
from matplotlib import image

from nam56r.kernels.registry import FAMILY
from nam56r.report import bench

RECORD = {
    "op": "m2rnn",
    "case": "B2 S4096 N51 K64 V16",
    "kernel": "cuda",
    "pass": "fwd",
    "ms": 0.8125,
    "tflops": 12.3456,
    "gbs": 900.0,
    "peak_mib": 321.4,
    "first_call_s": 0.2,
    "peer": "peer:xma",
    "peer_ms": 6.5,
    "ratio": 8.0,
    "floor_ms": 0.65,
    "commit": "abc1234",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "device": "NVIDIA H200",
    "date": "2026-01-02",
}
ALONE = {
    key: value
    for key, value in RECORD.items()
    if key not in ("peer", "peer_ms", "ratio", "tflops", "floor_ms", "triton")
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def test_every_operator_has_its_slot():
    assert bench.SLOTS.keys() == FAMILY.keys()


def test_table_and_plots(results, tmp_path):
    slower = RECORD | {"pass": "fwd+bwd", "ms": 250.4, "ratio": 0.5, "peer_ms": 125.2, "tflops": 1.234}
    norm = ALONE | {"op": "rms_norm", "case": "T8192 D4096", "kernel": "torch", "peak_mib": None}
    (results / "h200.json").write_text(json.dumps([slower, norm, RECORD]))
    (results / "cpu.json").write_text(json.dumps([ALONE | {"device": "cpu", "kernel": "reference", "gbs": None}]))
    page = bench.write(bench.read(results), tmp_path / "out")
    lines = page.read_text().splitlines()
    assert "| slot | op | case | kernel | pass | ms | µs/step | TFLOP/s | ratio to peer | peer | peak MiB |" in lines
    rows = [line for line in lines if line.startswith(("| R", "| all"))]
    assert rows == [
        "| R | m2rnn | B2 S4096 N51 K64 V16 | cuda | fwd | 0.812 | 0.198 | 12 | 8.00 | xma | 321 |",
        "| R | m2rnn | B2 S4096 N51 K64 V16 | cuda | fwd+bwd | 250 | 61.1 | 1.2 | 0.50 | xma | 321 |",
        "| all | rms_norm | T8192 D4096 | torch | fwd | 0.812 | – | – | – | – | – |",
        "| R | m2rnn | B2 S4096 N51 K64 V16 | reference | fwd | 0.812 | 0.198 | – | – | – | 321 |",
    ]
    assert lines.index("## NVIDIA H200") < lines.index("## cpu")
    assert "torch 2.11.0; triton 3.6.0; commit abc1234; 2026-01-02" in lines
    shown = {line.split("](")[1].rstrip(")") for line in lines if line.startswith("![")}
    assert shown == {"nvidia-h200-ratios.png", "nvidia-h200-m2rnn.png", "nvidia-h200-rms_norm.png", "cpu-m2rnn.png"}
    for name in shown:
        height, width = image.imread(page.parent / name).shape[:2]
        assert width > 500 and height > 100, name


def test_the_same_results_give_the_same_page(results, tmp_path):
    (results / "h200.json").write_text(json.dumps([RECORD]))
    first = bench.write(bench.read(results), tmp_path / "a").read_bytes()
    assert bench.write(bench.read(results), tmp_path / "b").read_bytes() == first


def test_time_by_the_step_is_a_recurrence_s():
    assert bench.us_per_step("m2rnn", "B2 S4096 N51 K64 V16", 4.096) == pytest.approx(1)
    assert bench.us_per_step("m2rnn", "B1 S8192 N51 K64 V16 packed8", 1.024) == pytest.approx(1)
    assert bench.us_per_step("m2rnn", "host B1 N51", 1.0) is None
    assert bench.us_per_step("mamba3_scan", "rank4 B2 S4096 H128 P64 G8 N128", 1.0) is None
    assert set(bench.RECURRENCES) <= FAMILY.keys()


def test_files_of_errors_are_no_records(results):
    (results / "h200-m2rnn-error.json").write_text('{"case": "B2", "errors": {}}')
    with pytest.raises(ValueError, match="no results in"):
        bench.read(results)
    (results / "h200.json").write_text(json.dumps([RECORD]))
    assert [r.op for r in bench.read(results)] == ["m2rnn"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results in .*results: `pytest bench/` writes one"),
        ("[]", "no results in .*results: its files have no record"),
        ("{", r"h200.json is not JSON"),
        ("{}", r"h200.json is not a list of records"),
        (json.dumps([RECORD, ALONE | {"ms": "fast"}]), r"h200.json, record 2: ms: Input should be a valid number"),
        (json.dumps([{"op": "m2rnn"}]), r"h200.json, record 1: case: Field required"),
        (json.dumps([RECORD | {"ms": 0}]), r"record 1: ms: Input should be greater than 0"),
        ("[3]", r"record 1: record: Input should be a valid dictionary"),
    ],
)
def test_what_cannot_be_read_is_one_line(results, content, message):
    if content is not None:
        (results / "h200.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        bench.read(results)
    assert "\n" not in str(caught.value)
