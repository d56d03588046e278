"""The command line: exit codes, one-line errors, JSON on stdout alone."""

import inspect
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nam56r import cli
from nam56r.kernels.registry import DEVICES
from nam56r.plan import PlanRefused, make_plan
from nam56r.recipe import PRESETS, Recipe
from nam56r.report import table

REFERENCES = [f"--kernel={op}=reference" for op in ("index_top_k", "sparse_latent_attention", "indexer_kl_loss")]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="nam56r")


def process(*arguments):
    command = [sys.executable, "-m", "nam56r", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def refused_line(result, code=2):
    """The one line that bad input is answered with."""
    assert result.exit_code == code, result.output
    assert not result.stdout
    line, rest = result.stderr.split("\n", 1)
    assert line.startswith("nam56r: ") and not rest
    return line


def test_help_is_quick_because_it_imports_nothing_heavy():
    script = (
        "import sys, nam56r.cli; print({'torch', 'megatron', 'numpy', 'pydantic', 'matplotlib'} & sys.modules.keys())"
    )
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert imported.stdout == "set()\n"
    done = process("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("plan", "train", "data", "doctor", "report", "version"))


def test_version():
    assert call("version").stdout == "0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--recipe", "nam65r"], "unknown recipe 'nam65r': no such file, and the presets are nam56r"),
        (["plan", "--set", "mla.kv_lora=32"], "unknown key mla.kv_lora: the nearest is mla.kv_lora_rank"),
        (["plan", "--set", "pattern=AXE"], "X"),
        (["plan", "--device", "h2000"], "--device is 'h2000', but must be here or one of cpu, a100, h100, h200, b200"),
        (["plan", "--kernel", "m2rnn"], "--kernel is 'm2rnn', but must be operator=name, such as m2rnn=reference"),
        (["plan", "--kernel", "m3rnn=x"], "--kernel names the operator 'm3rnn', but must name one of mla_attention"),
        (["plan", "--kernel", "m2rnn=fastest"], "m2rnn has no kernel 'fastest': one of"),
        (["plan", "--tp", "0"], "tensor_parallel is 0, but must be a whole number from 1"),
        (["data", "inspect", "nowhere/x"], "no data set at nowhere/x: make one with `nam56r data build"),
        (["data", "build", "nowhere", "--out", "x"], "no such file or folder: nowhere"),
        (["report", "--results", "nowhere"], "no results in nowhere: `pytest bench/` writes one"),
        (["train", "--data", "nowhere/x", "--out", "r", "--steps", "1"], "no data set at nowhere/x"),
        (["train", "--data", "x", "--out", "r", "--steps", "0"], "train: steps = 0: "),
        (["train", "--data", "x", "--out", "r", "--steps", "1", "--recipe", "?"], "unknown recipe '?'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused_line(call(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["plan", "--nonsense"], ["data", "build", "--out", "x"], ["train"]]
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert call(*arguments).exit_code == 2


def test_an_operating_system_error_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "file").write_text("in the way")
    line = refused_line(call("data", "build", tmp_path / "a.txt", "--out", tmp_path / "file" / "x"))
    assert line in (f"nam56r: {tmp_path}/file: File exists", f"nam56r: {tmp_path}/file: Not a directory")


def test_traceback_is_there_on_request():
    result = call("--traceback", "plan", "--recipe", "nam65r")
    assert result.exit_code == 1 and isinstance(result.exception, ValueError)


def test_data_build_and_inspect(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("print('hello')\n")
    (tmp_path / "in" / "b.bin").write_bytes(b"\0")
    built = process("data", "build", tmp_path / "in", "--out", tmp_path / "set" / "code")
    assert (built.returncode, built.stderr) == (0, "")
    assert "1 documents, 16 tokens" in built.stdout and "1 binary (a NUL byte)" in built.stdout
    again = call("data", "build", tmp_path / "in", "--out", tmp_path / "set" / "code")
    assert "code.bin is already there: --force replaces it" in refused_line(again)
    shown = call("data", "inspect", tmp_path / "set" / "code", "--show", 3, "--verify")
    assert shown.exit_code == 0 and "--- document 1\nprint('hello')" in shown.stdout
    found = json.loads(call("data", "inspect", tmp_path / "set" / "code", "--json", "--show", 1).stdout)
    assert found["tokens"] == 16 and found["starts"] == ["print('hello')"]
    assert found["tokenizer"] == {"type": "ByteLevelTokenizer", "model": None}
    with open(tmp_path / "set" / "code.bin", "r+b") as file:
        file.truncate(7)
    cut = process("data", "inspect", tmp_path / "set" / "code")
    assert (cut.returncode, cut.stdout) == (2, "")
    assert cut.stderr == f"nam56r: {tmp_path}/set/code.bin is truncated: expected 32 bytes, found 7\n"


@pytest.mark.parametrize("device, accepted", [("h200", True), ("a100", False)])
def test_plan_json_of_the_production_recipe(device, accepted):
    done = process("plan", "--recipe", "nam56r", "--device", device, "--json")
    assert (done.returncode, done.stderr) == (0 if accepted else 3, "")
    found = json.loads(done.stdout)
    assert found["recipe"] == "nam56r" and found["device"] == device and found["accepted"] is accepted
    assert found["counts"] == {"A": 13, "E": 22, "M": 13, "R": 4}
    refused = {refusal["layer"] for refusal in found["refusals"]}
    roles = {role: {slot["layer"] for slot in found["slots"] if slot["role"] == role} for role in ("mla", "dsa")}
    assert not refused if accepted else refused >= roles["dsa"] and not refused & roles["mla"]
    assert all(refusal["reasons"] for refusal in found["refusals"])


def test_a_refused_plan_is_a_table_and_exit_code_3():
    result = call("plan", "--recipe", "nam56r", "--device", "a100")
    assert result.exit_code == 3
    assert "nam56r on a100, bfloat16, micro-batch 1, TP 1: refused" in result.stdout
    assert "13 A (9 sparse), 22 E, 13 M, 4 R, 2 MTP" in result.stdout
    assert "A dsa  layers 5 9 13 21 25 29 37 41 45" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--recipe", "nam56r-tiny", "--device", "cpu"], ["--device", "h200"], ["--device", "h200", *REFERENCES]],
)
def test_an_accepted_plan_is_exit_code_0(arguments):
    result = call("plan", *arguments)
    assert result.exit_code == 0, result.output
    assert "accepted" in result.stdout and "REFUSED" not in result.stdout
    assert json.loads(call("plan", "--json", *arguments).stdout)["accepted"] is True


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_table_shows_every_slot_within_the_width(recipe, width, tp):
    authored = Recipe.load(recipe)
    try:
        plan = make_plan(authored, DEVICES["h200"], tensor_parallel=tp)
    except PlanRefused as refused:
        plan = refused.plan
    text = table.render(plan, authored, width)
    assert max(map(len, text.splitlines())) <= width
    shown = [line for line in text.split("\nslot")[1].splitlines() if line[:1] in "AEMR" and "  layer" in line]
    layers = [int(word) for line in _joined(text) for word in line.split() if word.isdigit()]
    assert shown and sorted(layers) == list(range(1, authored.depth + 1))


def _joined(text):
    """Headings of layer slots, their continuation lines joined."""
    lines = []
    for line in text.splitlines():
        if line[:10].isspace() and line[10:11].strip() and lines and lines[-1]:
            lines[-1] += line
        else:
            lines.append(line if "  layer" in line and not line.startswith(" ") else "")
    return [line.split("[")[0] for line in lines if line]


def test_train_hands_every_option_on(tmp_path, monkeypatch):
    import nam56r.train

    given = {}

    def run(options, show):
        given.update(vars(options))
        raise ValueError("far enough")

    monkeypatch.setattr(nam56r.train, "run", run)
    fields = nam56r.train.TrainOptions.model_fields
    required = ["--data", tmp_path / "set", "--out", tmp_path / "run", "--steps", 40]
    assert "far enough" in refused_line(call("train", *required))
    for name, field in fields.items():
        if name not in ("recipe", "data", "out", "steps"):
            assert given[name] == field.get_default(call_default_factory=True), name
    others = {"tp": 2, "ep": 2, "micro_batch": 3, "global_batch": 12, "lr": 0.5, "min_lr": 0.1, "warmup_steps": 7}
    others |= {
        "weight_decay": 0.2,
        "clip_grad": 2.0,
        "save_every": 9,
        "keep": 5,
        "log_every": 3,
        "seed": 8,
        "device": "cpu",
    }
    flags = [part for name, value in others.items() for part in (f"--{name.replace('_', '-')}", value)]
    more = ["--resume", "--kernel", "m2rnn=reference", "--set", "init_std=0.01", "--set", "mtp.num_depths=0"]
    assert "far enough" in refused_line(call("train", *required, *flags, *more))
    assert {name: given[name] for name in others} == others
    assert given["resume"] is True and given["kernels"] == {"m2rnn": "reference"}
    assert given["recipe"] == PRESETS["nam56r-tiny"].with_overrides(["init_std=0.01", "mtp.num_depths=0"])
    assert fields.keys() == {*others, "recipe", "data", "out", "steps", "resume", "kernels"}
    assert fields.keys() <= {*inspect.signature(cli.training.train).parameters, "kernels"}


def test_output_is_utf_8_in_any_locale():
    command = [sys.executable, "-W", "ignore", "-m", "nam56r", "translate", "--recipe", "nam56r-tiny"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0 and "R m2rnn  → R" in done.stdout.decode()
