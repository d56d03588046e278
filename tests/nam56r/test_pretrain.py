"""Megatron's own pretrain on a contract's output: two processes, however they split the model, train as one does."""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training import arguments
from megatron.training.argument_utils import core_transformer_config_from_args

from nam56r.data.tokenizer import Tokenizer
from nam56r.data.writer import build
from nam56r.launch import PROFILES, LaunchContract, RunOptions, make_contract
from nam56r.megatron.config import FREE, complete
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.pretrain import CPU_ARGUMENTS, SERVED, add_arguments, disagreements, unserved
from nam56r.recipe import Recipe
from nam56r.translate import megatron_args, translate
from tests.nam56r.recipes import recipes

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402

STEPS, SAVED = 4, 2
# Megatron's loggers wait for every pipeline stage: each has an E and a sparse A that computes indices (1 and 7). The
# second segment only passes on those of 1, which 5 uses.
LAYOUT = "AE|MR|AE|AEA"
# no faster kernels yet
REFERENCES = ("index_top_k", "sparse_latent_attention", "indexer_kl_loss")
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def recipe() -> Recipe:
    """Its M has sizes that the CUDA scan takes, and its sparse layers share indices."""
    mamba, sparse = ("mamba.headdim=32", "mamba.d_state=32"), ("dsa.ranks=[0, 1, 2, 3]", "dsa.share_every=2")
    return small_recipe("vocab_size=512", "pattern=AEMRAEAEA", "depth=9", *sparse, *mamba)


def contract(data: Path, out: Path, profile: str, *policy: str, steps: int = STEPS, **run: bool) -> LaunchContract:
    settings = [*policy, "entry=pretrain", "global_batch=4"]
    run = RunOptions(data=str(data), out=str(out), steps=steps, save_every=SAVED, log_every=1, **run)
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


def test_a_resumed_run_takes_more_steps_than_it_started_with(data, one, tmp_path):
    """The learning rate decays over all of them."""
    out, alone = one
    (tmp_path / "checkpoints").symlink_to(out / "checkpoints")
    made = contract(data, tmp_path, "cpu", steps=STEPS + 2, resume=True)
    done = pretrain(made, "--save", str(tmp_path / "saved"))
    further = steps(done)
    assert list(further) == [3, 4, 5, 6] and further[3] == pytest.approx(alone[3], rel=1e-6)
    rates = [float(rate) for rate in re.findall(r"learning rate: ([\d.E+-]+)", done.stdout)]
    low, high = made.run.final_lr, made.run.lr
    wanted = [low + (high - low) * (1 + math.cos(math.pi * step / 6)) / 2 for step in (3, 4, 5, 6)]
    assert rates == pytest.approx(wanted, rel=1e-5)


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
        (
            ["--hybrid-layer-pattern", "+EMRDEDED/+-", "--distributed-backend", "nccl"],
            2,
            "takes also --distributed-backend gloo",
        ),
        (["--load", "nowhere", "--exit-on-missing-checkpoint"], 2, "--load nowhere has no checkpoint"),
        (["--mock-data"], 2, "Megatron refuses its arguments: A single data source must be provided"),
        (["--yaml-cfg", "a.yaml"], 2, "--yaml-cfg is a.yaml, but must be left out"),
        (["--nam56r-kernel", "causal_conv1d=cuda"], 3, "is refused"),
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


def test_help():
    command = [sys.executable, "-m", "nam56r.megatron.pretrain", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--nam56r-recipe NAME|PATH" in done.stdout


def test_validation_mock_data_and_timers_are_megatrons(data, tmp_path):
    made = contract(data, tmp_path, "cpu", steps=2)
    words = list(made.run_args)
    del words[words.index("--data-path") : words.index("--data-path") + 2]
    made = made.model_copy(update={"run_args": tuple(words)})
    more = [
        "--mock-data",
        "--split",
        "90,5,5",
        "--eval-iters",
        "1",
        "--check-for-spiky-loss",
        "--timing-log-level",
        "2",
    ]
    done = pretrain(made, *more)
    assert list(steps(done)) == [1, 2]
    validation = re.findall(
        r"validation loss at iteration (\d) on (\w+) set \| lm loss value: ([\d.E+-]+)", done.stdout
    )
    assert [(step, name) for step, name, _ in validation] == [("2", "validation"), ("2", "test")]
    assert all(0 < float(loss) < 7 for *_, loss in validation)
    assert done.stdout.count("batch-generator") >= 2


# Megatron warms its fused functions up on random numbers, before the weights are drawn from the same generator
WITHOUT_WARM_UP = """
from megatron.training import initialize
from nam56r.megatron import pretrain
initialize._warmup_jit_function = lambda tp_size: None
pretrain.main()
"""


def test_both_entries_train_alike(data, tmp_path):
    """From the same seed: data, loss, gradient norm, schedule and optimizer, step by step."""
    made = contract(data, tmp_path, "cpu")
    made.recipe.save(tmp_path / "recipe.yaml")
    words = [*made.processes.entry_args, *made.generated_native_args, *made.fixed_policy.args, *made.run_args]
    command = [sys.executable, "-c", WITHOUT_WARM_UP, *words]
    megatrons = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    run = made.run.model_copy(update={"out": str(tmp_path / "ours")})
    made = make_contract(recipe(), PROFILES["cpu"].with_overrides(["global_batch=4"]), run)
    command = [sys.executable, "-m", "nam56r", *made.processes.entry_args, *made.fixed_policy.args, *made.run_args]
    command[command.index("--recipe") + 1] = str(tmp_path / "recipe.yaml")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines())
    ours = {line["step"]: (line["lm_loss"], line["grad_norm"]) for line in lines}
    theirs = steps(megatrons)
    # Megatron's second line after a start has the mean loss of both lines
    theirs[2] = (2 * theirs[2][0] - theirs[1][0], theirs[2][1])
    assert theirs.keys() == ours.keys()
    for step, (loss, norm) in theirs.items():
        assert loss == pytest.approx(ours[step][0], rel=2e-6) and norm == pytest.approx(ours[step][1], abs=6e-4)


@pytest.fixture(scope="module")
def parsed():
    """(words) -> what Megatron's parser and checks make of them in one process, with our arguments."""
    apply_patches("model")  # R in patterns
    parser = add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))

    def parsed(words):
        with pytest.MonkeyPatch.context() as given:
            given.setattr(arguments, "add_megatron_arguments", lambda empty: parser)
            given.setattr(arguments, "_print_args", lambda title, args: None)
            given.setattr(arguments, "get_device_arch_version", lambda: 10)
            given.setattr(sys, "argv", ["pretrain", "--nam56r-recipe", "nam56r", "--micro-batch-size", "1", *words])
            args = arguments.parse_args()
            arguments.validate_args(args)
            return args

    return parsed


def faults(args, recipe: Recipe) -> list[str]:
    """What is refused of arguments, whatever the plan."""
    found, stock = [*disagreements(args, recipe), *unserved(args)], args.spec is None
    try:
        complete(core_transformer_config_from_args(args), recipe, None, stock=stock, also=found)
    except ValueError as error:
        assert str(error).endswith(": take them from `nam56r translate` or `nam56r launch`")
        return str(error).partition(": ")[2].rpartition(": ")[0].split("; ")
    return []


@settings(max_examples=60, deadline=None)
@given(recipe=recipes() | recipes("AM").map(lambda r: r.with_overrides(["mamba.kind=mamba2"])))
def test_any_recipe_agrees_with_its_own_flags(parsed, recipe):
    """Without A, E, M or R too, and where Megatron's own layers serve it."""
    translated = translate(recipe)
    assume(not translated.refusals)  # the plan's to refuse
    assert faults(parsed(megatron_args(recipe, translated).args), recipe) == []


def test_the_layout_says_how_wide_the_tensor_between_stages_is(parsed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for layout, columns in (("DE|MR|DE|DED/+-", 8), ("DEMRDE|DED/+-", 0)):
        words = [*native(), "--hybrid-layer-pattern", layout, "--pipeline-model-parallel-size", "2"]
        args = parsed(words)
        config = core_transformer_config_from_args(args)
        complete(config, recipe(), None, layout=args.hybrid_layer_pattern)
        assert config.index_columns == columns


def test_the_operators_own_flags_are_taken(parsed):
    words = [*native(), *"--bf16 --use-distributed-optimizer --recompute-granularity full --seed 7".split()]
    words += (
        "--recompute-method uniform --recompute-num-layers 1 --no-bias-dropout-fusion --moe-per-layer-logging".split()
    )
    words += "--cuda-graph-impl none --no-masked-softmax-fusion --deterministic-mode --eod-mask-loss".split()
    assert faults(parsed(words), recipe()) == []


def native() -> tuple[str, ...]:
    return megatron_args(recipe(), translate(recipe())).args


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--moe-ffn-hidden-size 64", "moe_ffn_hidden_size is 64, but the recipe has 32"),
        (
            "--hybrid-layer-pattern +EMRDEDED/+-",
            "hybrid_layer_pattern is +EMRDEDED/+-, but the recipe has DEMRDEDED/+-",
        ),
        ("--padded-vocab-size 640", "padded_vocab_size is 640, but the recipe has 512"),
        ("--position-embedding-type none", "position_embedding_type is none, but the recipe has rope"),
        ("--seq-length 16", "seq_length is 16, but the recipe has 32"),
        ("--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec", "spec is ['megatron.core"),
        ("--transformer-impl transformer_engine", "transformer_impl is transformer_engine, but the recipe has local"),
        ("--mamba-state-dim 64", "mamba_state_dim is 64, but the recipe has 32"),
        # what the recipe doesn't speak of
        ("--moe-router-topk-scaling-factor 2.5", "moe_router_topk_scaling_factor is 2.5, but the recipe has None"),
        ("--apply-layernorm-1p", "layernorm_zero_centered_gamma is True, but the recipe has False"),
        ("--init-method-std 0.03", "init_method is ('normal_', {'mean': 0.0, 'std': 0.03}), but"),
        ("--calculate-per-token-loss", "calculate_per_token_loss is True, but the recipe has False"),
        ("--moe-z-loss-coeff 0.1", "moe_z_loss_coeff is 0.1"),
        # what isn't served
        ("--reset-attention-mask", "reset_attention_mask is True, but must be False: the layers take whole sequences"),
        ("--log-throughput", "log_throughput is True, but must be False: Megatron's count of FLOPs"),
        ("--bf16", "use_distributed_optimizer is False, but must be True in bfloat16"),
        ("--full-validation", "multiple_validation_sets is False, but must be True with full_validation"),
        ("--nam56r-device cpu", "--nam56r-device cpu takes also --distributed-backend gloo"),
    ],
)
def test_other_arguments_are_refused(parsed, words, fault):
    found = faults(parsed([*native(), *words.split()]), recipe())
    assert found[0].startswith(fault)
    assert len(found) == 1 or "--init-method-std" in words  # three initialisations have it


def test_everything_is_refused_at_once(parsed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [*native(), "--tensor-model-parallel-size", "2", "--padded-vocab-size", "640", "--squared-relu", "--sft"]
    words.remove("--swiglu")
    names = [fault.partition(" ")[0] for fault in faults(parsed(words), recipe())]
    wanted = {"padded_vocab_size", "sft", "sequence_parallel", "expert_tensor_parallel_size"}
    assert wanted | {"activation_func", "gated_linear_unit"} <= set(names)


def test_a_missing_spec_and_attention_without_mla_are_refused(parsed):
    words = list(native())
    start = words.index("--spec")
    del words[start : start + 3]
    assert faults(parsed(words), recipe())[0].startswith("spec is None, but the recipe has ['nam56r.megatron.specs'")
    words.remove("--multi-latent-attention")
    found = faults(parsed([*words, "--hybrid-layer-pattern", "MEMEMMMMM"]), recipe())
    assert "multi_latent_attention is False, but the recipe has attention" in found


def test_what_is_named_is_megatrons(parsed):
    args = parsed(native())
    for name, (value, _) in SERVED.items():
        assert getattr(args, name) == value, name
    names = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    assert names >= FREE
    assert CPU_ARGUMENTS.keys() <= vars(args).keys()
