"""A launch that runs: two processes over gloo, the folder it leaves, signals, exit codes, and nothing run when refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nam56r import cli, data
from nam56r.launch import PROFILES, LaunchContract, LauncherProfile, RunOptions, make_contract
from nam56r.launch import start as starting
from nam56r.recipe import Recipe
from tests.nam56r.train_worker import small_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a data set and a recipe."""
    place = tmp_path_factory.mktemp("launch it")
    texts = place / "texts"
    texts.mkdir()
    (texts / "a.py").write_text(" ".join(f"def f{i}(x): return x + {i % 7}" for i in range(80)))
    data.build([texts], place / "set")
    small_recipe().save(place / "small.yaml")
    return place


def call(place, out, *arguments):
    """A launch in this process, for what must not run."""
    words = ["launch", "--recipe", place / "small.yaml", "--out", place / out, *arguments]
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="nam56r")


def launch(place, out, *arguments):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "nam56r",
        "launch",
        "--recipe",
        place / "small.yaml",
        "--out",
        place / out,
    ]
    return subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )


@pytest.fixture(scope="module")
def ran(place):
    arguments = ["--profile", "cpu-x2", "--entry", "train", "--data", place / "set", "--steps", 2, "--log-every", 1]
    return launch(place, "run", *arguments)


def test_two_processes_train_and_leave_everything(place, ran):
    run = place / "run"
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "small.yaml" not in ran.stdout and "on profile cpu-x2: accepted" in ran.stdout
    assert ran.stdout.count("step 2/2") == 1
    assert {"recipe.yaml", "profile.yaml", "contract.json", "launch.sh"} <= {found.name for found in run.iterdir()}
    assert Recipe.load(run / "recipe.yaml") == small_recipe()
    contract = LaunchContract.load(run / "contract.json")
    assert contract.accepted and contract.profile == LauncherProfile.load(run / "profile.yaml")
    # what ran is what the contract says
    options = json.loads((run / "options.json").read_text())
    p = contract.profile
    wanted = {
        "tp": p.tp,
        "ep": p.ep,
        "micro_batch": p.micro_batch,
        "global_batch": p.global_batch,
        "device": "cpu",
        "steps": 2,
    }
    assert {name: options[name] for name in wanted} == wanted
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    # two processes shared each global batch of two sequences
    assert [line["consumed_samples"] for line in lines] == [2, 4] and p.processes == 2
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_the_same_folder_is_refused_without_resume_and_nothing_runs(place, ran):
    before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
    again = call(place, "run", "--profile", "cpu-x2", "--data", place / "nowhere", "--steps", 3)
    assert again.exit_code == 3
    # the missing data is said in the same breath
    assert "has a launch already" in " ".join(again.stdout.split()) and "no data set at" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")} == before
    other = call(
        place, "run", "--profile", "cpu-x2", "--data", place / "set", "--steps", 3, "--resume", "--set", "init_std=0.5"
    )
    assert other.exit_code == 3 and "init_std: 0.5 here, 0.02 there" in other.stdout


def test_a_resumed_run_goes_on_with_what_it_started_with(place, ran):
    words = ["--profile", "cpu-x2", "--data", place / "set", "--steps", 3, "--resume"]
    changed = call(place, "run", *words, "--lr", 0.5, "--seed", 2, "--entry", "pretrain")
    said = " ".join(changed.stdout.split())
    assert changed.exit_code == 3
    for fault in ("lr: 0.5 here, 0.001 there", "final_lr: 0.05 here", "seed: 2 here, 1 there", "entry: pretrain here"):
        assert fault in said
    # Megatron would train from the start
    folder = place / "without checkpoint"
    folder.mkdir()
    written(folder, entry="pretrain")
    none = call(place, folder.name, *words, "--entry", "pretrain")
    assert none.exit_code == 3 and "has no checkpoint" in " ".join(none.stdout.split())
    (place / "a file").write_text("")
    file = call(place, "a file", "--profile", "cpu-x2", "--data", place / "set", "--steps", 3)
    assert file.exit_code == 3 and "is no folder" in " ".join(file.stdout.split())
    (folder / "contract.json").write_text("{}")
    broken = call(place, folder.name, *words)
    assert broken.exit_code == 3 and "has no launch that can be read" in " ".join(broken.stdout.split())


def written(folder, **policy):
    """Leave in a folder what a launch writes before it runs."""
    settings = [f"{key}={value}" for key, value in policy.items()]
    run = RunOptions(data="d", out=str(folder), steps=3)
    sys.modules["nam56r.launch.start"].write(
        make_contract(small_recipe(), PROFILES["cpu-x2"].with_overrides(settings), run)
    )


def test_a_refused_launch_leaves_no_folder(place):
    refused = call(place, "refused", "--profile", "h200", "--data", place / "set", "--steps", 3)
    assert refused.exit_code == 3
    assert "0 GPUs here (none)" in refused.stdout and "plan" in refused.stdout
    assert not (place / "refused").exists()
    small = small_recipe().with_overrides(["vocab_size=128"])
    small.save(place / "few.yaml")
    tokens = call(
        place, "few", "--recipe", place / "few.yaml", "--profile", "cpu", "--data", place / "set", "--steps", 3
    )
    assert tokens.exit_code == 3 and "token ids up to 511" in tokens.stdout and not (place / "few").exists()


@pytest.fixture
def contract(tmp_path):
    return make_contract(small_recipe(), PROFILES["cpu"], RunOptions(data="d", out=str(tmp_path / "r"), steps=3))


def runs_instead(monkeypatch, tmp_path, text):
    """start() runs this script in place of the contract's."""
    script = tmp_path / "other.sh"
    script.write_text(text)
    monkeypatch.setattr(sys.modules["nam56r.launch.start"], "write", lambda contract: script)


@pytest.mark.parametrize(("text", "code"), [("exit 0", 0), ("exit 37", 37), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_script_s(text, code, contract, monkeypatch, tmp_path):
    runs_instead(monkeypatch, tmp_path, text)
    assert starting(contract) == code


def test_torchrun_is_the_one_beside_this_python(contract, monkeypatch, tmp_path):
    runs_instead(monkeypatch, tmp_path, f"command -v torchrun > '{tmp_path}/which'")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert starting(contract) == 0
    assert Path((tmp_path / "which").read_text().strip()) == Path(sys.executable).with_name("torchrun")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_once(number, contract, monkeypatch, tmp_path):
    name = signal.Signals(number).name.removeprefix("SIG")
    runs_instead(
        monkeypatch,
        tmp_path,
        f"n=0; trap 'n=$((n+1))' {name}; touch '{tmp_path}/ready'\nfor _ in $(seq 8); do sleep 0.1; done; exit $((40 + n))",
    )
    before = signal.getsignal(number)

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert starting(contract) == 41
    sender.join()
    assert signal.getsignal(number) == before


def test_write_refuses_a_refused_contract(tmp_path):
    from nam56r.launch import LaunchRefused

    with pytest.raises(LaunchRefused) as refused:
        make_contract(small_recipe(), PROFILES["h200"], RunOptions(data="d", out=str(tmp_path / "r"), steps=3))
    with pytest.raises(ValueError, match="there is no script for it"):
        starting(refused.value.contract)
    assert not (tmp_path / "r").exists()


def test_the_profile_that_is_left_makes_the_same_contract(tmp_path):
    run = RunOptions(data="d", out=str(tmp_path / "r"), steps=3)
    contract = make_contract(small_recipe(), PROFILES["cpu-x2"], run)
    contract.profile.save(tmp_path / "p.yaml")
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["r_layer_indices"] == [4]
    again = make_contract(small_recipe(), LauncherProfile.load(tmp_path / "p.yaml"), run)
    same = {"generated_native_args", "fixed_policy", "run_args", "processes", "profile"}
    assert again.model_dump(include=same) == contract.model_dump(include=same)
