"""Two processes over gloo, tensor- or expert-parallel, give the loss and gradients of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from nam56r.kernels.registry import DEVICES
from nam56r.megatron.model import build_model
from nam56r.megatron.parallel import destroy, initialize
from nam56r.plan import make_plan

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402

WORKER = Path(__file__).parent / "parallel_worker.py"


def launch(folder: Path, name: str, tp: int, ep: int, processes: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, str(WORKER), str(folder), name, str(tp), str(ep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    launch(folder, "one", 1, 1, 1)
    launch(folder, "tp2", 2, 1, 2)
    launch(folder, "ep2", 1, 2, 2)
    device = initialize("cpu", seed=3)
    recipe = small_recipe()
    model = build_model(
        recipe, make_plan(recipe, DEVICES["cpu"], dtype=torch.float32), device=device, dtype=torch.float32
    )

    def gradients(name: str) -> dict[str, torch.Tensor]:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / name)))
        return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}

    result = {
        name: (json.loads((folder / f"{name}.json").read_text()), gradients(name)) for name in ("one", "tp2", "ep2")
    }
    destroy()
    return result


@pytest.mark.parametrize("name", ["tp2", "ep2"])
def test_two_processes_equal_one(runs, name):
    wrote, gradients = runs["one"]
    other_wrote, other = runs[name]
    assert other_wrote["loss"] == pytest.approx(wrote["loss"], rel=1e-5)
    assert gradients.keys() == other.keys()
    differing = {
        key: ((other[key] - exact).norm() / exact.norm()).item()
        for key, exact in gradients.items()
        if not (other[key] - exact).norm() <= 1e-4 * exact.norm() + 1e-9
    }
    assert not differing, differing
    assert all(g.norm() > 0 for g in gradients.values())


def test_tensor_parallel_ranks_hold_the_same_replicas(runs):
    """To the bit: replicas that part by a digit a step would be different models after many."""
    assert runs["tp2"][0]["unlike"] == {"drawn": [], "loaded": [], "gradients": []}
