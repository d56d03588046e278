"""What `nam56r doctor` says of the machine and of the kernels."""

import importlib.metadata
import json

import pytest
import torch
from typer.testing import CliRunner

from nam56r import doctor
from nam56r.cli import app
from nam56r.kernels import extension, nvrtc
from nam56r.kernels.registry import DEVICES, candidates
from nam56r.plan import PlanRefused, make_plan
from nam56r.recipe import Recipe


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAM56R_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return doctor.examine()


def test_it_names_what_is_here(found):
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0.5
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["megatron-core"].startswith("0.19.")
    assert found["versions"]["cupy-cuda13x"] == importlib.metadata.version("cupy-cuda13x")
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["extension"]["loaded"] == (extension.load() is None)


def test_every_slot_says_what_would_run_and_why_the_rest_would_not(found):
    assert "h200" in found["slots"] and len(found["slots"]) <= 2
    for slots in found["slots"].values():
        assert slots.keys() == set(doctor.SLOTS.values())
        for operators in slots.values():
            for operator, answer in operators.items():
                names = [kernel.name for kernel in candidates(operator) if kernel.role != "peer"]
                free = [name for name in names if name not in answer["refused"]]
                assert answer["kernel"] == (free[0] if free else None)
                assert all(reason for reasons in answer["refused"].values() for reason in reasons)


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_it_agrees_with_the_plan(device):
    recipe = Recipe.load("nam56r")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        plan = make_plan(recipe, DEVICES[device], dtype=dtype)
    except PlanRefused as refused:
        plan = refused.plan
    slots = doctor.runnable(recipe, DEVICES[device])
    for slot in plan.slots:
        said = slots[doctor.SLOTS[slot.role]]
        assert {op: answer["kernel"] for op, answer in said.items() if answer["kernel"]} == slot.kernels


def test_text_fits_80_columns_and_names_every_slot(found):
    text = doctor.render(found, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n{slot}\n" in text for slot in doctor.SLOTS.values())
    assert "What the slots of nam56r would run on:" in text


def test_what_is_missing_is_said(found):
    poor = found | {
        "gpus": [],
        "driver": None,
        "extension": {"loaded": False, "reason": "not built: no nvcc on PATH and no CUDA_HOME", "archs": []},
    }
    text = doctor.render(poor, 80)
    assert "none that PyTorch can use" in text and "not built: no nvcc on PATH and no CUDA_HOME" in text


def test_kernels_compiled_at_run_time_are_listed(found, tmp_path, monkeypatch):
    none = " ".join(doctor.render(found, 80).split())
    assert f"Kernels compiled at run time, in {found['compiled']['folder']}: none yet What the slots" in none
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    monkeypatch.setenv("NAM56R_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "tiny").mkdir()
    code = "namespace nam56r::tiny { template <int N> __global__ void fill(int* x) { *x = N; } }"
    (tmp_path / "tiny" / "fill.cuh").write_text(code)
    made = [
        nvrtc.compile("tiny", "fill.cuh", [f"nam56r::tiny::fill<{n}>" for n in range(1, last)], arch)[0]
        for last, arch in ((2, "sm_80"), (15, "sm_90a"))
    ]
    said = json.loads(json.dumps(doctor.examine()["compiled"]))
    assert said["folder"] == str(tmp_path / "cache") and said["reason"] is None
    assert {unit["file"] for unit in said["units"]} == {unit.file for unit in made}
    text = doctor.render(found | {"compiled": said | {"folder": "/cache"}}, 80)
    assert max(map(len, text.splitlines())) <= 80 and "none yet" not in text
    together = " ".join(text.split())
    for unit in made:
        when = unit.compiled.astimezone()
        how = f"{unit.arch}, {when:%Y-%m-%d %H:%M}, {unit.seconds:.1f} s, {unit.size / 1024:.0f} KiB"
        assert f"tiny {', '.join(f'fill<{n + 1}>' for n in range(len(unit.names)))}: {how}" in together
    poor = doctor.render(found | {"compiled": said | {"reason": "CuPy is not installed", "units": []}}, 80)
    assert "  none yet\n  none can be compiled here: CuPy is not installed\n" in poor


@pytest.mark.parametrize(
    ("script", "driver"),
    [
        ("echo 575.57.08; echo 575.57.08", "575.57.08"),
        ("echo no devices; exit 6", "nvidia-smi fails: no devices"),
        ("exit 9", "nvidia-smi fails: 9"),
    ],
)
def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch, script, driver):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._driver() == driver


def test_the_command_prints_and_exits_0():
    said = CliRunner().invoke(app, ["doctor", "--json"])
    assert said.exit_code == 0
    assert json.loads(said.stdout).keys() >= {"machine", "gpus", "driver", "versions", "extension", "compiled", "slots"}
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0 and "A sparse: DSA" in shown.stdout
