"""Megatron's own pretrain on a contract's output: two processes, however they split the model, train as one does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nam56r.data.tokenizer import Tokenizer
from nam56r.data.writer import build
from nam56r.launch import PROFILES, LaunchContract, RunOptions, make_contract
from nam56r.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402

STEPS, SAVED = 4, 2
# Megatron's loggers wait for every pipeline stage: each has an E and a sparse A
LAYOUT = "AE|AE|MR|MR"
# no faster kernels yet
REFERENCES = ("m2rnn", "mamba3_scan", "index_top_k", "sparse_latent_attention", "indexer_kl_loss")
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def recipe() -> Recipe:
    return small_recipe("vocab_size=512", "pattern=AEAEMRMR", "depth=8", "dsa.ranks=[0, 1]")


def contract(data: Path, out: Path, profile: str, *policy: str, resume: bool = False) -> LaunchContract:
    settings = [*policy, "entry=pretrain", "global_batch=4"]
    run = RunOptions(data=str(data), out=str(out), steps=STEPS, save_every=SAVED, log_every=1, resume=resume)
    return make_contract(recipe(), PROFILES[profile].with_overrides(settings), run)


def pretrain(made: LaunchContract, *more: str) -> subprocess.CompletedProcess:
    """Run a contract's words, and more of Megatron's flags."""
    out = Path(made.run.out)
    out.mkdir(parents=True, exist_ok=True)
    made.recipe.save(out / "recipe.yaml")
    words = [*made.generated_native_args, *made.fixed_policy.args, *made.run_args, *more]
    command = [*made.processes.torchrun, *made.processes.entry_args, *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def steps(done: subprocess.CompletedProcess) -> dict[int, tuple[float, float]]:
    """(LM loss, gradient norm) by step, from Megatron's log; the last step's of a resumed run is a mean of Megatron's."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    log = re.findall(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+).*?grad norm: ([\d.]+)", done.stdout)
    return {int(step): (float(loss), float(norm)) for step, loss, norm in log}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "code"
    build([Path(__file__).parent], prefix, tokenizer=Tokenizer())
    return prefix


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> tuple[Path, dict[int, tuple[float, float]]]:
    """The run of one process: its folder, with a checkpoint at step SAVED, and its steps."""
    out = tmp_path_factory.mktemp("one")
    trained = steps(pretrain(contract(data, out, "cpu")))
    assert list(trained) == list(range(1, STEPS + 1)) and trained[STEPS][0] < trained[1][0]
    (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return out, trained


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        # with TP 2 Megatron has an optimizer of its own for the experts, and one process's state isn't of that form
        (["tp=2"], ["--no-load-optim"]),
        (["pp=2", "vpp=2", f"layout={LAYOUT}"], []),
    ],
    ids=["tp2", "pp2 vpp2"],
)
def test_two_processes_go_on_as_one_would(data, one, tmp_path, policy, more):
    out, alone = one
    made = contract(data, tmp_path, "cpu-x2", *policy, resume=True)
    (tmp_path / "checkpoints").symlink_to(out / "checkpoints")
    together = steps(pretrain(made, "--save", str(tmp_path / "saved"), *more))
    assert list(together) == [3, 4]
    assert together[3] == pytest.approx(alone[3], rel=1e-3)
    assert more or together[4][1] == pytest.approx(alone[4][1], rel=1e-3)


def test_data_and_expert_parallel_with_the_distributed_optimizer_and_recompute(data, one, tmp_path):
    """From the same weights as one process; and a resumed run, which takes the moments and their count of steps, goes on."""
    _, alone = one
    flags = ["--use-distributed-optimizer"]
    flags += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    together = steps(pretrain(contract(data, tmp_path, "cpu-x2", "ep=2"), *flags))
    assert together.keys() == alone.keys()
    for step, (loss, norm) in together.items():
        assert (loss, norm) == pytest.approx(alone[step], rel=1e-3), step
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    resumed = steps(pretrain(contract(data, tmp_path, "cpu-x2", "ep=2", resume=True), *flags))
    assert resumed[3] == together[3] and resumed[4][1] == together[4][1]


@pytest.mark.gpu
def test_on_a_gpu_in_bf16_a_resumed_run_goes_on(data, tmp_path):
    """The distributed optimizer over bf16 and fp32 parameters, saved and loaded."""
    kernels = [f"kernels.{operator}=reference" for operator in REFERENCES]
    trained = steps(pretrain(contract(data, tmp_path, "h200", *kernels)))
    assert list(trained) == list(range(1, STEPS + 1)) and trained[STEPS][0] < trained[1][0]
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    resumed = steps(pretrain(contract(data, tmp_path, "h200", *kernels, resume=True)))
    assert resumed[3] == pytest.approx(trained[3], rel=1e-4)
    assert resumed[4][1] == pytest.approx(trained[4][1], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--moe-ffn-hidden-size", "64"], 2, "moe_ffn_hidden_size is 64, but the recipe has 32: take them from"),
        (["--nam56r-kernel", "m2rnn=fastest"], 2, "m2rnn has no kernel 'fastest'"),
        (["--nam56r-kernel", "causal_conv1d=cuda"], 3, "is refused"),
        (["--distributed-backend", "nccl"], 2, "--nam56r-device cpu takes also --distributed-backend gloo"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(data, tmp_path, words, code, message):
    made = contract(data, tmp_path, "cpu")
    made.recipe.save(tmp_path / "recipe.yaml")
    words = [*made.generated_native_args, *made.fixed_policy.args, *made.run_args, *words]
    command = [sys.executable, "-m", "nam56r.megatron.pretrain", *made.processes.entry_args, *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("nam56r: ")]
    assert len(said) == 1 and message in said[0]
