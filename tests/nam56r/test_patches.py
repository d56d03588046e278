"""The patch table is whole: nothing in Megatron or torch changes that it doesn't list, and each patch does its work."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import megatron.core
import pytest
from typer.testing import CliRunner

from nam56r.cli import app
from nam56r.megatron import patches
from nam56r.megatron.patches import PATCHES, SCOPES, Patch
from nam56r.report import patches as report

WORKER = Path(__file__).parent / "patch_worker.py"
FOLDER = Path(patches.__file__).parent
TARGETS = [patch.target for patch in PATCHES]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What processes of their own found, by name; they run side by side."""
    folder = tmp_path_factory.mktemp("patches")
    commands = ([WORKER, folder, json.dumps(TARGETS)], ["-m", "nam56r", "patches", "--json"])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = [subprocess.Popen([sys.executable, *command], env=environment, **pipes) for command in commands]
    for process in started:
        out, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-4000:]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("table", "train")}
    return found | {"command": json.loads(out)}


def targets(*scopes):
    return sorted(patch.target for patch in PATCHES if patch.scope in scopes)


def test_table():
    assert len({patch.name for patch in PATCHES}) == len(set(TARGETS)) == len(PATCHES)
    order = list(SCOPES)
    assert [p.scope for p in PATCHES] == sorted((p.scope for p in PATCHES), key=order.index)
    for patch in PATCHES:
        assert patch.versions and patch.reason and patch.refusal() is None


def test_nearly_all_of_megatron_is_looked_at(processes):
    imported, absent = processes["table"]["megatron"]
    assert len(imported) > 400 and len(absent) < len(imported) / 10
    ours, missing = processes["table"]["ours"]
    assert {name.rpartition(".")[2] for name in ours} == {file.stem for file in FOLDER.glob("[!_]*.py")}
    assert not missing


def test_importing_changes_nothing(processes):
    assert processes["table"]["import"] == []


def test_only_pretrain_loads_megatrons_training_package():
    """It configures the root logger when it is imported, so that every run would have Megatron's log on its stdout."""
    loading = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None) or ""]
            if any(name.startswith("megatron.training") for name in names):
                loading.add(file.stem)
    assert loading <= {"pretrain"}


def test_a_scope_changes_its_targets_only(processes):
    assert processes["table"]["scopes"] == {scope: targets(scope) for scope in SCOPES}


def test_patches_are_in_force_from_apply_on(processes):
    assert processes["table"]["verified"] == {patch.name: [False, True] for patch in PATCHES}


def test_training_changes_nothing_else(processes):
    assert processes["train"]["changed"] == targets("model", "checkpoint", "cpu")
    assert processes["train"]["unlisted"] == []


def test_what_the_table_does_not_list_is_found(processes):
    assert len(processes["train"]["injected"]) > 20
    assert processes["train"]["found"] == processes["train"]["injected"]


# what a probe of patch_worker.py gives without the patch, and with it; None without: an error of torch's or Megatron's
BEHAVIOUR = {
    "r-symbol": (None, "MR"),
    "r-name": (False, True),
    # of a deferred head, whose "logits" are none, and of a whole one: 2 of 3 right
    "mtp-acceptance": ([[2, 3], [2, 3]], [[0, 0], [2, 3]]),
    # without indices in the tensor between stages, and with four columns of them
    "stage-tensor": ([8, 8], [8, 12]),
    "mamba2-without-mamba-ssm": ("ImportError", "AssertionError"),
    "mamba2-scan": (None, [2, 1, 1]),
    "mamba2-norm": ([], [1, 1, -1, 1]),
    "mamba2-prefill": (None, [1, 2, 1, 4]),
    "cpu-current-device": (None, "cpu"),
    "cpu-current-stream": (None, True),
    "cpu-stream": (None, True),
    "cpu-synchronize": (None, None),
    "cpu-recompute-get": (None, True),
    "cpu-recompute-set": (None, True),
    "cpu-eager": (True, False),
    "pretrain-helpers": (None, None),
    "pretrain-cpu-start": (True, False),
    "pretrain-cpu-arch": (None, 10),
    "pretrain-cpu-get-rng-state": (None, True),
    "pretrain-cpu-set-rng-state": (False, True),
    "pretrain-cpu-tensors": (None, "cpu"),
}


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_what_a_patch_is_for(processes, name):
    before, after = (probe[name] for probe in processes["table"]["probes"])
    wanted, changed = BEHAVIOUR[name]
    assert before == wanted or wanted is None and before.endswith(("Error", "SystemExit"))
    assert after == changed


def test_every_patch_has_a_test_of_what_it_is_for():
    saving = {"checkpoint-results", "checkpoint-notice"}  # below
    resuming = {"checkpoint-moments", "checkpoint-steps", "pretrain-parameter-groups"}  # test_pretrain.py, test_gpu.py
    watching = {"pretrain-nan-scores"}  # test_nan_scores.py
    assert {patch.name for patch in PATCHES} == {*BEHAVIOUR, *saving, *resuming, *watching}


def test_a_save_is_quiet_and_leaves_no_process(processes):
    assert processes["train"]["patched save"] == {"said": [], "processes": 0}
    stock = processes["train"]["stock save"]
    assert stock["processes"] == 1 and "async save is deprecated" in stock["said"][0]


def test_an_unknown_version_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.20.0+abc")
    fakes = [fake(f"patch-{i}") for i in range(2)]
    monkeypatch.setattr(patches, "PATCHES", tuple(fakes))
    wanted = "patch patch-0 is known for megatron-core 0.19.x, not for 0.20.0; patch patch-1 is known for"
    with pytest.raises(RuntimeError, match=wanted):
        patches.apply_patches("model")
    assert not any(patch.verify() for patch in fakes)
    monkeypatch.setattr(megatron.core, "__version__", "0.19.9+abc")
    patches.apply_patches("model")
    assert all(patch.verify() for patch in fakes)


def test_apply_leaves_what_is_in_force_and_says_what_did_not_take(monkeypatch):
    applied = []
    done, deaf = fake("done"), fake("deaf")
    done.apply()
    done = replace(done, apply=lambda: applied.append("done"))
    deaf = replace(deaf, apply=lambda: applied.append("deaf"))
    monkeypatch.setattr(patches, "PATCHES", (done, deaf))
    with pytest.raises(RuntimeError, match="patch deaf did not take on here.deaf"):
        patches.apply_patches("model")
    assert applied == ["deaf"]
    patches.apply_patches("cpu")
    with pytest.raises(ValueError, match="scope is 'gpu', but must be one of model, checkpoint, cpu"):
        patches.apply_patches("gpu")


def fake(name: str) -> Patch:
    """A patch of scope "model" that changes nothing but its own memory."""
    force = []
    return Patch(name, "model", f"here.{name}", "a test", lambda: force.append(1), lambda: bool(force))


def raises():
    raise AttributeError("module 'here' has no attribute 'gone'")


@pytest.fixture
def mixed(monkeypatch):
    """What is found of a table in which one patch works and four don't."""
    early = fake("early")
    early.apply()
    table = (
        fake("good"),
        replace(fake("old"), versions=("0.17.", "0.18.")),
        early,
        replace(fake("deaf"), apply=lambda: None),
        replace(fake("gone"), verify=raises),
    )
    monkeypatch.setattr(patches, "PATCHES", table)
    return patches.examine()


def test_examine_says_why(mixed):
    version = megatron.core.__version__.partition("+")[0]
    assert {patch["name"]: patch["fault"] for patch in mixed["patches"]} == {
        "good": None,
        "old": f"known for megatron-core 0.17.x, 0.18.x, not for {version}",
        "early": "was in force before it was applied",
        "deaf": "did not take",
        "gone": "AttributeError: module 'here' has no attribute 'gone'",
    }
    assert [patch["verified"] for patch in mixed["patches"]] == [True, False, False, False, False]


def test_command_as_json(processes):
    found = processes["command"]
    assert found["megatron-core"] == megatron.core.__version__.partition("+")[0]
    for patch, said in zip(PATCHES, found["patches"], strict=True):
        assert said == {
            "name": patch.name,
            "scope": patch.scope,
            "target": patch.target,
            "reason": patch.reason,
            "versions": ["0.19.x"],
            "verified": True,
            "fault": None,
        }


def test_command_as_text(processes, monkeypatch):
    monkeypatch.setattr(report, "examine", lambda: processes["command"])
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["patches"])
    assert result.exit_code == 0 and "\x1b" not in result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith(f": {len(PATCHES)} patches, {len(PATCHES)} verified")
    words, joined = " ".join(result.output.split()), "".join(result.output.split())
    for patch in PATCHES:
        assert f"{patch.name} {patch.scope} 0.19.x yes" in words
        assert patch.target in joined and " ".join(patch.reason.split()) in words


def test_command_refuses(mixed, monkeypatch):
    monkeypatch.setattr(report, "examine", lambda: mixed)
    result = CliRunner().invoke(app, ["patches"])
    assert result.exit_code == 3
    assert "5 patches, 1 verified" in result.output and "not verified: did not take" in result.output
    result = CliRunner().invoke(app, ["patches", "--json"])
    assert result.exit_code == 3 and json.loads(result.stdout) == mixed


def test_command_where_the_table_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(report, "_EXAMINE", "raise ImportError('no module named megatron.core.gone')")
    result = CliRunner().invoke(app, ["patches"])
    assert result.exit_code == 1
    assert result.stderr == (
        "nam56r: the patches could not be examined (exit code 1): ImportError: no module named megatron.core.gone\n"
    )
