"""One rank of a pipelined run of a model that shares indices, for test_index_sharing.py.

python pipeline_worker.py FOLDER NAME, under torchrun or alone; NAME is one of RUNS. Weights come from FOLDER/weights,
written by the run named "one"; gradients go to FOLDER/NAME as a distributed checkpoint, the microbatches' losses to
FOLDER/NAME.json. Megatron's own schedules run the stages.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from parallel_worker import small_recipe

from nam56r.kernels.registry import DEVICES
from nam56r.megatron.config import transformer_config
from nam56r.megatron.head import Model
from nam56r.megatron.parallel import destroy, initialize
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.specs import nam56r_stack_spec
from nam56r.plan import make_plan
from nam56r.recipe import Recipe
from nam56r.translate import translate

RUNS = {
    "one": dict(tp=1, pp=1, vpp=None),
    "pp2": dict(tp=1, pp=2, vpp=None),
    "tp2 pp2 vpp2": dict(tp=2, pp=2, vpp=2),
}
# the layers that segments after the first begin with: of D E M R D E D E D
CUTS = {"pp2": (5,), "tp2 pp2 vpp2": (3, 5, 7)}
MICROBATCHES = 4


def recipe_of() -> Recipe:
    """Sparse A at 1, 5, 7, 9; 1 and 7 compute."""
    base = ("pattern=AEMRAEAEA", "depth=9", "dsa.ranks=[0, 1, 2, 3]", "dsa.share_every=2")
    return small_recipe(*base, "dsa.index_num_heads=24")


def chunks_of(recipe: Recipe, name: str, device: torch.device) -> list[Model]:
    """This rank's segments."""
    sizes, layers = RUNS[name], recipe.layers.layers
    cuts = [0, *(first - 1 for first in CUTS.get(name, ())), len(layers)]
    layout = "|".join(layers[a:b] for a, b in zip(cuts, cuts[1:]))
    pattern = translate(recipe, layout=layout).native_pattern
    plan = make_plan(recipe, DEVICES["cpu"], tensor_parallel=sizes["tp"], dtype=torch.float32)
    config = transformer_config(
        recipe,
        plan,
        device=device,
        dtype=torch.float32,
        layout=pattern,
        tensor_parallel=sizes["tp"],
        pipeline_parallel=sizes["pp"],
        virtual_pipeline_model_parallel_size=sizes["vpp"],
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=False,
    )
    chunks = []
    for stage in range(sizes["vpp"] or 1):
        place = dict(ignore_virtual=False, vp_stage=stage) if sizes["vpp"] else {}
        chunk = Model(
            config,
            nam56r_stack_spec,
            vocab_size=recipe.vocab_size,
            max_sequence_length=recipe.seq_length,
            hybrid_layer_pattern=pattern,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vp_stage=stage if sizes["vpp"] else None,
        )
        chunks.append(chunk)
    return chunks


def main(folder: Path, name: str) -> None:
    sizes, recipe = RUNS[name], recipe_of()
    for scope in ("model", "checkpoint"):
        apply_patches(scope)
    device = initialize("cpu", **sizes, seed=3)
    apply_patches("pretrain-cpu")  # the schedules make tensors on CUDA by name
    chunks = chunks_of(recipe, name, device)

    def state() -> dict:
        return {f"chunk {i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}

    def write(where: Path) -> None:
        if torch.distributed.get_rank() == 0:
            where.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(state(), str(where))

    if name == "one":
        write(folder / "weights")
    loaded = dist_checkpointing.load(state(), str(folder / "weights"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk {i}"])
    reduce = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(c.config, reduce, c, disable_bucketing=True) for c in chunks]
    for chunk in wrapped:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.zero_grad_buffer()
    shape = (MICROBATCHES, 1, recipe.seq_length + 1)
    rows = torch.randint(recipe.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(recipe.seq_length)[None]

    def forward(batches, model):
        row = next(batches)
        last = model.module.post_process
        out = model(row[:, :-1], positions, None, labels=row[:, 1:] if last else None)
        return out, lambda losses: (losses.mean(), losses.mean().detach())

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(rows) for _ in wrapped] if sizes["vpp"] else iter(rows),
        model=wrapped if sizes["vpp"] else wrapped[0],
        num_microbatches=MICROBATCHES,
        seq_length=recipe.seq_length,
        micro_batch_size=1,
    )
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps([loss.item() for loss in losses]))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    write(folder / name)
    destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
