"""Whole runs through Megatron on the CPU: killed, stopped and resumed ones give the bits of one that was left alone."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nam56r import data

STEPS, SAVE_EVERY, GLOBAL_BATCH = 7, 3, 2
BASE = {"steps": STEPS, "save_every": SAVE_EVERY, "global_batch": GLOBAL_BATCH, "device": "cpu", "keep": 1}
KILLS = {
    "before": "read 3",  # in step 2, before the first checkpoint
    "between": "read 10",  # in step 6, after the first
    "writing": "write 2",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data set and every run that the tests below look at."""
    place = tmp_path_factory.mktemp("train")
    texts = place / "texts"
    texts.mkdir()
    for number in range(6):
        text = " ".join(f"def f{i * number % 13}(x): return x + {i % 7}" for i in range(40))
        (texts / f"{number}.py").write_text(text)
    data.build([texts], place / "data")

    def options(out: str, **changed) -> dict:
        return BASE | {"data": str(place / "data"), "out": str(place / out)} | changed

    runs = [{"name": "alone", "options": options("alone")}]
    for name, kill in KILLS.items():
        runs.append({"name": f"{name}-killed", "options": options(name), "kill": kill})
        runs.append({"name": f"{name}-resumed", "options": options(name, resume=True)})
    runs += [
        {"name": "stopped", "options": options("stopped"), "kill": "stop 5"},
        {"name": "stopped-resumed", "options": options("stopped", resume=True)},
        {"name": "two", "options": options("two"), "ranks": 2},
        {"name": "diverged", "options": options("diverged", lr=1e30, warmup_steps=0, save_every=1)},
        {"name": "odd", "options": options("odd", save_every=1), "kill": "score 2", "ranks": 2},
    ]
    (place / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).with_name("train_worker.py")
    subprocess.run(
        [sys.executable, "-W", "ignore", worker, place / "runs.json"],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return place


def result(place, name):
    return json.loads((place / f"{name}.json").read_text())


def losses(run):
    """Every step's metrics but those that a clock or the operating system decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "memory_gib")} for line in lines]


def test_a_run_leaves_everything(place):
    run = place / "alone"
    assert result(place, "alone")["codes"] == [0], result(place, "alone")["said"]
    lines = losses(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["consumed_samples"] for line in lines] == [GLOBAL_BATCH * n for n in range(1, STEPS + 1)]
    first = lines[0]
    assert len(first["mtp_losses"]) == 1 and set(first["aux_losses"]) == {"load_balancing_loss", "indexer_loss"}
    assert first["loss"] == pytest.approx(first["lm_loss"] + 0.1 * first["mtp_losses"][0])
    assert abs(first["lm_loss"] - math.log(512)) < 0.5 and first["mfu"] is None
    assert lines[-1]["lm_loss"] < first["lm_loss"] - 0.2
    # cosine from the peak to a tenth of it at the last step; 7 // 20 steps of warm-up are none
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-4 + 0.9e-3 * (1 + math.cos(math.pi * n / STEPS)) / 2 for n in range(STEPS)]
    )
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "plan.json").read_text())["accepted"]
    assert (run / "recipe.yaml").exists() and (run / "options.json").exists()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000007\n"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000007"]


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_gives_the_same_bits(place, name):
    killed, resumed = result(place, f"{name}-killed"), result(place, f"{name}-resumed")
    assert killed["codes"] == [-signal.SIGKILL], killed["said"]
    assert resumed["codes"] == [0], resumed["said"]
    after = "resuming after step 3" in resumed["said"]
    assert after == (name != "before")
    assert losses(place / name) == losses(place / "alone")
    assert not list((place / name).rglob("*.tmp"))


def test_stopped_saves_and_resumes(place):
    stopped, resumed = result(place, "stopped"), result(place, "stopped-resumed")
    assert stopped["codes"] == [10] and "stopping after this step" in stopped["said"], stopped["said"]
    assert "step_00000003" in stopped["said"]
    assert resumed["codes"] == [0] and "resuming after step 3" in resumed["said"], resumed["said"]
    assert losses(place / "stopped") == losses(place / "alone")


def test_two_processes_share_the_batch(place):
    two = result(place, "two")
    assert two["codes"] == [0, 0], two["said"]
    assert two["said"].count("step 7/7") == 1 and two["said"].count("CPU mode is on") == 1
    for ours, alone in zip(losses(place / "two"), losses(place / "alone"), strict=True):
        assert ours["lm_loss"] == pytest.approx(alone["lm_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(place):
    diverged = result(place, "diverged")
    assert diverged["codes"] == [1]
    assert "Diverged: step 2: the LM loss is nan. Stopped; " in diverged["said"], diverged["said"]
    assert "step_00000001 is whole" in diverged["said"]
    assert len(losses(place / "diverged")) == 1


def test_an_index_score_that_is_no_number_stops_every_process(place):
    odd = result(place, "odd")
    assert odd["codes"] == [1, 1], odd["said"]
    assert odd["said"].count("Diverged: step 2: an index score of sparse attention is NaN.") == 2, odd["said"]
    assert len(losses(place / "odd")) == 1


def test_refusals_before_anything_is_built(place):
    from nam56r.train import TrainOptions, run
    from tests.nam56r.train_worker import small_recipe

    def refused(match, recipe=small_recipe(), **changed):
        with pytest.raises(ValueError, match=match):
            run(TrainOptions(recipe=recipe, **(BASE | {"data": str(place / "data"), "out": place / "new"} | changed)))
        assert not (place / "new").exists()

    other = small_recipe().with_overrides(["mla.kv_lora_rank=32", "hidden_size=64"])
    refused("has a run already: continue it with --resume", out=place / "alone")
    refused("nothing to resume in .*new", resume=True)
    refused("another recipe: hidden_size: 64 .*; mla.kv_lora_rank: 32", recipe=other, out=place / "alone", resume=True)
    refused("started otherwise: lr: 0.5 here, 0.001 there", out=place / "alone", resume=True, lr=0.5)
    refused("token ids up to 511, .*vocab_size 256", recipe=small_recipe().with_overrides(["vocab_size=256"]))
    refused("global_batch = 3, but must be a multiple", micro_batch=2, global_batch=3)
    refused("tp 2 .*must divide the number of processes, 1", tp=2)
    refused("no data set at .*nowhere", data=str(place / "nowhere"))


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"steps": 0}, "steps = 0: .*greater than or equal to 1"),
        ({"lr": math.nan}, "lr = nan"),
        ({"warmup_steps": 7}, "warmup_steps = 7, but must be less than steps = 7"),
        ({"min_lr": 1.0}, "min_lr = 1.0, but must not be more than lr = 0.001"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"stpes": 7}, "unknown key stpes: the nearest is steps"),
    ],
)
def test_options_name_what_is_wrong(changed, match):
    from nam56r.train import TrainOptions
    from tests.nam56r.train_worker import small_recipe

    with pytest.raises(ValueError, match=match) as caught:
        TrainOptions(recipe=small_recipe(), data="data", out="run", **({"steps": 7} | changed))
    assert "\n" not in str(caught.value)
