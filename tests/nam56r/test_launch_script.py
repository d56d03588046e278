"""What a launch prints: text in 80 columns, JSON, and a shell script that bash and shellcheck read as it is meant."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nam56r import cli
from nam56r.launch import PROFILES, LaunchContract, LauncherProfile, RunOptions, make_contract, shell
from nam56r.recipe import PRESETS, Recipe
from nam56r.report.launch import render
from tests.nam56r.test_launch import REFERENCES, RUN, TINY, contract_of

HOSTILE = [
    "with space",
    'it\'s "quoted"',
    "$HOME `id` $(id) ${x}",
    "line\nbreak\ttab",
    "back\\slash\\n",
    "# comment; rm -rf | & > *.? [a] {b,c} ~ !x",
    "naïve “curly” 日本語",
    "-leading",
    "=x,y",
    "shellcheck disable=SC1000",
    "$'ansi'",
    "ends in \\",
    " '",
    "\x7f\x1b[31m",
]


def accepted(profile="cpu", recipe=TINY, **run):
    return make_contract(recipe, PROFILES[profile].with_overrides(REFERENCES), RunOptions(**(RUN.model_dump() | run)))


def shellcheck(script):
    path = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([path, "--shell=bash", "-"], input=script.encode(), capture_output=True)
    return done.stdout.decode()


def read_back(script, **inherited):
    """What bash makes of a script: its exported variables and the words it would run. In a folder of its own, far down."""
    show = "python3 -c 'import os, sys, json; print(json.dumps([sys.argv[1:], dict(os.environ)]))'"
    assert script.count("\nexec torchrun ") == 1
    printed = script.replace("\nexec torchrun ", f"\nexec {show} torchrun ")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"} | inherited
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["bash", "-c", printed], capture_output=True, check=True, env=environment, cwd=folder)
    return json.loads(done.stdout)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("entry", ["train", "pretrain"])
def test_scripts_of_all_presets_pass_shellcheck_and_say_the_contract(profile, entry):
    single = ["pp=1", "vpp=1", "cuda_graphs=none", "recompute=none", "mtp_depths=null"]
    contract = contract_of(TINY, PROFILES[profile], *REFERENCES, f"entry={entry}", *single)
    assert contract.accepted, contract.refused
    script = shell(contract)
    assert shellcheck(script) == ""
    words, environment = read_back(script)
    native = contract.generated_native_args if entry == "pretrain" else ()
    launcher = [*contract.processes.torchrun, *contract.processes.entry_args]
    assert words == [*launcher, *native, *contract.fixed_policy.args, *contract.run_args]
    assert contract.fixed_policy.environment.items() <= environment.items()
    # three arrays: no line has flags of two of them
    assert ("native_args=(" in script) == (entry == "pretrain") and "policy_args=(" in script and "run_args=(" in script
    for note in contract.custom_notes:
        assert note[:60] in script


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paths_and_values_survive(text):
    profile = PROFILES["cpu"].with_overrides([f"environment.X_CACHE_DIR={json.dumps(text)}", "entry=pretrain"])
    contract = make_contract(TINY, profile, RunOptions(data=f"d/{text}", out=text, steps=3))
    script = shell(contract)
    assert shellcheck(script) == ""
    words, environment = read_back(script)
    assert environment["X_CACHE_DIR"] == text
    assert words[words.index("--data-path") + 1] == f"d/{text}"
    folder = f"./{text}" if text.startswith("-") else text
    assert words[words.index("--nam56r-recipe") + 1] == f"{folder}/recipe.yaml"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text(min_size=1, max_size=30).filter(lambda text: "\0" not in text and text.isprintable() or "\n" in text)
)
def test_any_path_survives(text):
    try:
        # the script makes the folder: one below its own
        run = RunOptions(data=text, out=text.replace("..", "").strip("/") or "out", steps=3)
    except ValueError:
        return
    words, _ = read_back(shell(make_contract(TINY, PROFILES["cpu"], run)))
    assert words[words.index("--data") + 1] == run.prefix and words[words.index("--out") + 1] == run.folder


def test_what_decides_mathematics_is_not_inherited():
    hostile = {"NVIDIA_TF32_OVERRIDE": "1", "NVTE_FLASH_ATTN": "0", "PYTORCH_CUDA_ALLOC_CONF": "x", "CUBLASLT_X": "1"}
    hostile |= {"PET_MAX_RESTARTS": "3", "PYTHONOPTIMIZE": "1"}
    contract = contract_of(TINY, PROFILES["h200"], *REFERENCES)
    assert contract.accepted
    _, environment = read_back(shell(contract), **hostile, NCCL_SOCKET_IFNAME="eth0")
    assert not hostile.keys() & environment.keys() and environment["NCCL_SOCKET_IFNAME"] == "eth0"
    # cleared first, then set
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "not inherited: PYTHONOPTIMIZE, NVIDIA_TF32_OVERRIDE, " in " ".join(render(contract).split())


def test_the_script_brings_its_recipe_and_takes_no_other(tmp_path):
    recipe = TINY.with_overrides(["name='é # \"x\" $(id)'"])
    script = shell(make_contract(recipe, PROFILES["cpu"], RunOptions(data="d", out="run at night", steps=3)))
    assert shellcheck(script) == ""
    (tmp_path / "torchrun").write_text("#!/bin/sh\nexit 37\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

    def run():
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run().returncode == 37
    left = tmp_path / "run at night" / "recipe.yaml"
    assert Recipe.load(left) == recipe
    recipe.save(left)  # as `launch` and `train` do
    assert run().returncode == 37
    recipe.with_overrides(["mamba.mimo_rank=1"]).save(left)
    other = run()
    assert (other.returncode, other.stderr) == (2, "run at night/recipe.yaml is another recipe than this launch has\n")


def test_the_script_writes_over_no_checkpoint(tmp_path):
    pretrain = PROFILES["cpu"].with_overrides(["entry=pretrain"])
    (tmp_path / "torchrun").write_text("#!/bin/sh\nexit 37\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

    def run(**options):
        script = shell(make_contract(TINY, pretrain, RunOptions(data="d", out="a b", steps=3, **options)))
        assert shellcheck(script) == ""
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run().returncode == 37
    (tmp_path / "a b" / "checkpoints").mkdir()
    (tmp_path / "a b" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    again = run()
    assert again.returncode == 2 and "go on from them with nam56r launch --resume" in again.stderr
    assert run(resume=True).returncode == 37


def test_hostile_names_are_comments_only():
    recipe = TINY.with_overrides(["name='x$(id) `id` \" # shellcheck disable=SC1'"])
    profile = LauncherProfile(**(PROFILES["cpu"].model_dump() | {"name": "a; exit 1 # 'b"}))
    script = shell(make_contract(recipe, profile, RUN))
    assert shellcheck(script) == ""
    read_back(script)
    (line,) = [line for line in script.splitlines() if "exit 1" in line]
    assert line.startswith("# launch: x$(id)")


def test_several_nodes_meet():
    contract = contract_of(TINY, PROFILES["cpu-x2"], "nodes=2", "rendezvous=node0:29500", "global_batch=4")
    assert contract.accepted
    words, _ = read_back(shell(contract))
    assert words[:9] == "torchrun --rdzv-backend c10d --rdzv-endpoint node0:29500 --nnodes 2 --nproc-per-node 2".split()


def test_a_refused_contract_has_no_script():
    with pytest.raises(ValueError, match=r"nam56r-tiny on profile h200 is refused \(plan\): there is no script for it"):
        shell(contract_of(TINY, PROFILES["h200"], "device=a100"))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", PRESETS)
def test_text_has_every_block_in_80_columns_without_colour(profile, recipe):
    contract = contract_of(PRESETS[recipe], PROFILES[profile])
    text = render(contract, 80)
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    titles = re.findall(r"^(\w[\w ,;]*?) -+$", text, re.M)
    assert titles[0] == ("profile" if contract.accepted else "refused")
    words = text.split()
    for flag in (*contract.generated_native_args, *contract.fixed_policy.args, *contract.run_args):
        if flag.startswith("--"):
            assert flag in words, flag
    for name, value in contract.fixed_policy.environment.items():
        assert f"{name}={value}" in words
    flat = " ".join(words)
    for note in (*contract.custom_notes, *contract.notes):
        assert " ".join(note.split()) in flat
    for check in contract.checks:
        assert check.name in flat
    for check in contract.refused:
        assert " ".join(check.rule.split()) in flat
        for part in (*check.value.split("; "), *check.remedy.split("; ")):
            assert " ".join(part.split()) in flat


# --- the command line


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="nam56r")


DRY = ["launch", "--data", "d/x", "--out", "runs/a", "--steps", 40, "--dry-run"]
REFUSED = ["--recipe", "nam56r-tiny", "--profile", "h200", "--policy", "device=a100"]  # without kernels for it


def test_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call(*DRY, "--recipe", "nam56r-tiny", "--profile", "cpu-x2")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("nam56r-tiny on profile cpu-x2: accepted\n")
    refused = call(*DRY, *REFUSED)
    assert refused.exit_code == 3
    assert re.match(r"nam56r-tiny on profile h200: refused: 1 of \d+ checks\n", refused.stdout)
    assert not list(tmp_path.iterdir())


def test_json_and_script_are_the_contract_s():
    arguments = ["--recipe", "nam56r-tiny", "--profile", "cpu"]
    found = LaunchContract.model_validate_json(call(*DRY, *arguments, "--json").stdout)
    assert found == make_contract(TINY, PROFILES["cpu"], RUN.model_copy(update={"data": "d/x"})).model_copy(
        update={"memory_available": found.memory_available, "checks": found.checks}
    )
    script = call(*DRY, *arguments, "--script")
    assert script.exit_code == 0 and script.stdout == shell(found)
    none = call(*DRY, *REFUSED, "--script")
    assert (none.exit_code, none.stdout) == (3, "") and "refused: 1 of" in none.stderr
    refused = call(*DRY, *REFUSED, "--json")
    assert refused.exit_code == 3 and json.loads(refused.stdout)["accepted"] is False


def test_options_reach_the_contract():
    more = [
        "--set",
        "init_std=0.01",
        "--policy",
        "gpus_per_node=4",
        "--policy",
        "global_batch=8",
        "--kernel",
        "m2rnn=reference",
    ]
    more += ["--entry", "pretrain", "--lr", 0.5, "--min-lr", 0.1, "--warmup-steps", 7, "--weight-decay", 0.2]
    more += ["--save-every", 9, "--log-every", 3, "--seed", 8, "--resume"]
    found = LaunchContract.model_validate_json(
        call(*DRY, "--recipe", "nam56r-tiny", "--profile", "cpu", *more, "--json").stdout
    )
    assert found.recipe == TINY.with_overrides(["init_std=0.01"]) and found.accepted
    assert (found.profile.gpus_per_node, found.profile.global_batch, found.profile.entry) == (4, 8, "pretrain")
    assert found.profile.kernels == {"m2rnn": "reference"}
    expected = {"lr": 0.5, "min_lr": 0.1, "warmup_steps": 7, "weight_decay": 0.2, "save_every": 9, "log_every": 3}
    assert found.run == RunOptions(data="d/x", out="runs/a", steps=40, resume=True, seed=8, **expected)
    strict = json.loads(call(*DRY, "--recipe", "nam56r-tiny", "--profile", "cpu", "--strict", "--json").stdout)
    assert strict["strict"] and [check["name"] for check in strict["checks"] if not check["passed"]] == ["translation"]


def test_schema_is_the_profile_s():
    shown = call("launch", "--schema")
    assert shown.exit_code == 0 and json.loads(shown.stdout) == LauncherProfile.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "launch also needs --data, --out, --steps"),
        (["launch", "--data", "x", "--steps", "3"], "launch also needs --out"),
        ([*DRY, "--profile", "h300"], "unknown profile 'h300': no such file, and the presets are h200, h200-x2"),
        ([*DRY, "--recipe", "nam65r"], "unknown recipe 'nam65r'"),
        ([*DRY, "--policy", "tpp=2"], "--policy tpp=2: unknown key tpp: the nearest is tp"),
        ([*DRY, "--kernel", "m2rnn"], "--kernel is 'm2rnn', but must be operator=name"),
        ([*DRY, "--json", "--script"], "--json and --script exclude each other"),
        (["launch", "--data", "x", "--out", "y", "--steps", "3", "--json"], "they go with --dry-run"),
        ([*DRY, "--steps", "0"], "launch: steps = 0"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2 and not result.stdout
    assert message in result.stderr and result.stderr.count("\n") == 1


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(
            ["--policy", "--profile", "--recipe", "--steps", "--entry", "--set", "--json", "--strict", "--kernel"]
        )
        | st.sampled_from(["tp=2", "cpu", "nam56r-tiny", "3", "train", "layout=null", "pp=x", "m2rnn=reference"])
        | st.text(max_size=8),
        max_size=6,
    )
)
def test_any_command_line_ends_in_one_of_three_codes(words):
    result = call(*DRY, "--recipe", "nam56r-tiny", "--profile", "cpu", *words)
    assert result.exit_code in (0, 2, 3), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
