"""A run's folder, killed before any of its file operations; the signals; what is shown."""

import io
import json
import os
import signal
import sys

import pytest
import torch
from rich.console import Console

from nam56r.kernels.registry import DEVICES
from nam56r.plan import make_plan
from nam56r.train import folder
from nam56r.train import interrupt as interrupt_module
from nam56r.train.folder import RunFolder
from nam56r.train.interrupt import Interrupt
from nam56r.train.plot import draw
from nam56r.train.progress import Display
from tests.nam56r.train_worker import small_recipe

RECORD = {"seed": 1, "lr": 0.1, "steps": 2}
FILES = {"weights": "w" * 100, "moments": "m" * 100}
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


@pytest.fixture(scope="module")
def plan():
    return make_plan(small_recipe(), DEVICES["cpu"], dtype=torch.float32)


def train(path, plan):
    """Two steps that save each; goes on where the folder is."""
    run, recipe = RunFolder(path), small_recipe()
    run.check(recipe, RECORD, resume=(path / "options.json").exists())
    for step in range(run.open(recipe, RECORD, plan) + 1, 3):
        run.log({"step": step})
        run.unfinished(step).mkdir()
        for name, text in FILES.items():
            (run.unfinished(step) / name).write_text(f"{text}{step}")
        run.commit(step, keep=1)


def train_until(path, plan, count):
    """`train` in a process of its own, killed before its count-th file operation under path; whether it came so far."""
    process = os.fork()
    if process == 0:
        left = [count]

        def watch(event, arguments):
            if event in CHANGES and str(path) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            train(path, plan)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def whole(path):
    """What `latest` names is whole."""
    latest = RunFolder(path).latest
    if latest:
        step = RunFolder(path).step
        assert {p.name: p.read_text() for p in latest.iterdir()} == {k: f"{v}{step}" for k, v in FILES.items()}


def test_killed_before_every_file_operation(tmp_path, plan, monkeypatch):
    # a process that dies loses nothing it wrote; a machine would
    monkeypatch.setattr(folder, "_flush", lambda path: None)
    count, killed = 0, True
    while killed:
        count += 1
        path = tmp_path / str(count)
        killed = train_until(path, plan, count)
        whole(path)
        train(path, plan)
        whole(path)
        assert [line["step"] for line in RunFolder(path).metrics()] == [1, 2]
        # an older one may be left where the kill came before it was removed: the next checkpoint removes it
        left = {p.name for p in (path / "checkpoints").iterdir()}
        assert {"latest", "step_00000002"} <= left <= {"latest", "step_00000001", "step_00000002"}
        assert not list(path.rglob("*.tmp"))
    assert count > 25


def test_metrics_go_back_to_the_checkpoint(tmp_path, plan):
    train(tmp_path, plan)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3}\n{"step": 4, "lo')
    assert RunFolder(tmp_path).open(small_recipe(), RECORD, plan) == 2
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1, 2]


def test_checks_name_the_difference(tmp_path, plan):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="nothing to resume in .*run: no run was started"):
        run.check(small_recipe(), RECORD, resume=True)
    train(run.path, plan)
    run.check(small_recipe(), RECORD | {"steps": 9}, resume=True)
    with pytest.raises(ValueError, match="started otherwise: lr: 0.2 here, 0.1 there; new: 1 here, None there"):
        run.check(small_recipe(), RECORD | {"lr": 0.2, "new": 1}, resume=True)
    with pytest.raises(ValueError, match="another recipe: init_std: 0.5 .*0.02"):
        run.check(small_recipe().with_overrides(["init_std=0.5"]), RECORD, resume=True)
    with pytest.raises(ValueError, match="has a run already"):
        run.check(small_recipe(), RECORD, resume=False)
    (run.path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(ValueError, match="latest names step_00000009, which is not there"):
        run.check(small_recipe(), RECORD, resume=True) or run.step


def test_the_first_signal_asks_and_the_second_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt_module, "SAME_PRESS_S", 1e9)
    said = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(lambda: said.append("stopping"), lambda: said.append("leaving")) as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the same press, handed on by torchrun
        assert interrupt.asked and said == ["stopping"]
    assert signal.getsignal(signal.SIGINT) is before

    monkeypatch.setattr(interrupt_module, "SAME_PRESS_S", -1)
    process = os.fork()
    if process == 0:
        with Interrupt(lambda: None, lambda: (tmp_path / "left").touch()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGINT
    assert (tmp_path / "left").exists()


def line(step, **changed):
    losses = {"loss": 2.5, "lm_loss": 2.25, "mtp_losses": [2.5], "tokens_per_s": 1234.5, "mfu": None, "memory_gib": 0.5}
    return {"step": step} | losses | changed


def test_lines_without_a_terminal_and_a_bar_on_one():
    plain = io.StringIO()
    with Display(Console(file=plain, width=200), 0, 25, every=10) as display:
        for step in range(1, 26):
            display.show(line(step))
    shown = plain.getvalue().splitlines()
    assert [text.split()[1] for text in shown] == ["1/25", "10/25", "20/25", "25/25"]
    assert shown[0] == "step 1/25  loss 2.5000  LM 2.2500  MTP 2.5000  1,234 tokens/s  0.5 GiB"

    terminal = io.StringIO()
    with Display(Console(file=terminal, width=160, force_terminal=True), 5, 25, every=10) as display:
        display.show(line(6, mfu=0.375))
    assert "6/25" in terminal.getvalue() and "MFU 37.5%" in terminal.getvalue()


def test_the_plot_is_replaced_whole(tmp_path):
    lines = [line(step, mtp_losses=[2.5, 2.75]) for step in (1, 2)]
    draw(lines, 3.0, "small on cpu", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    draw([], 3.0, "small on cpu", tmp_path / "loss.png")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
    assert json.dumps(lines)
