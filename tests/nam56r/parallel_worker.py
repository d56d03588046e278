"""One rank of a run whose loss and gradients test_parallel.py compares with those of one process.

python parallel_worker.py FOLDER NAME TP EP [SETTING …], under torchrun or alone; settings change the small recipe.
Weights come from FOLDER/weights, written by the run named "one"; gradients go to FOLDER/NAME as a distributed
checkpoint, the loss to FOLDER/NAME.json, and with it the parameters that tensor-parallel ranks hold alike but not to
the bit: as drawn, as loaded, and by their gradients.
"""

import json
import os
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from nam56r.kernels.registry import DEVICES
from nam56r.megatron.model import build_model
from nam56r.megatron.parallel import destroy, initialize
from nam56r.plan import make_plan
from nam56r.recipe import Recipe

SMALL = (
    "pattern=AEMRA depth=5 dsa.ranks=[0] hidden_size=64 ffn_hidden_size=96 vocab_size=128 seq_length=32 "
    "mla.num_heads=4 mla.q_lora_rank=16 mla.kv_lora_rank=16 mla.qk_nope_head_dim=16 mla.qk_rope_head_dim=8 "
    "mla.v_head_dim=16 dsa.top_k=8 dsa.loss_coeff=1.0 dsa.index_num_heads=2 dsa.index_head_dim=16 "
    "mamba.headdim=16 mamba.d_state=16 mamba.ngroups=4 mamba.mimo_rank=2 "
    "moe.num_experts=4 moe.top_k=2 moe.ffn_hidden_size=32 moe.shared_ffn_hidden_size=32 moe.aux_loss_coeff=0.01 "
    "m2rnn.num_heads=3 m2rnn.k_head_dim=16 m2rnn.v_head_dim=16 mtp.num_depths=1"
)


def small_recipe(*settings: str) -> Recipe:
    """Every letter (sparse and dense A), an MTP depth, sizes that take a second."""
    return Recipe.load("nam56r-tiny").with_overrides([*SMALL.split(), *settings])


def unlike(model: torch.nn.Module, value: str) -> list[str]:
    """Names of parameters that tensor-parallel ranks should have alike and whose `value` ("data", …) differs."""
    group = parallel_state.get_tensor_model_parallel_group()
    names = []
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            mine = getattr(parameter, value)
            all_of_them = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(all_of_them, mine.contiguous(), group=group)
            names += [] if all(torch.equal(mine, other) for other in all_of_them) else [name]
    return names


def main(folder: Path, name: str, tp: int, ep: int, *settings: str) -> None:
    device = initialize("cpu", tp=tp, ep=ep, seed=3)
    recipe = small_recipe(*settings)
    plan = make_plan(recipe, DEVICES["cpu"], tensor_parallel=tp, dtype=torch.float32)
    model = build_model(recipe, plan, device=device, dtype=torch.float32)
    differing = {"drawn": unlike(model, "data")}
    weights = folder / "weights"
    if name == "one":
        weights.mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(weights))
    else:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(weights)))
    differing["loaded"] = unlike(model, "data")
    # every process draws the same two sequences; data-parallel ranks take one each, one process both in turn
    tokens = torch.randint(recipe.vocab_size, (2, recipe.seq_length + 1), generator=torch.Generator().manual_seed(1))
    ranks = parallel_state.get_data_parallel_world_size()
    mine = tokens.chunk(2)[parallel_state.get_data_parallel_rank() :: ranks]
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model, disable_bucketing=True
    )
    wrapped.zero_grad_buffer()
    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler, DSAIndexerLossAutoScaler):
        scaler.set_loss_scale(torch.tensor(1 / len(mine)))
    losses = []
    for row in mine:
        positions = torch.arange(recipe.seq_length)[None]
        loss = wrapped(row[:, :-1], positions, None, labels=row[:, 1:]).mean() / len(mine)
        loss.backward()
        losses.append(loss.detach())
    finalize_model_grads([wrapped])
    differing["gradients"] = unlike(model, "main_grad")
    total = torch.stack(losses).sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)
    (folder / name).mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / name))
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"{name}.json").write_text(json.dumps({"loss": total.item() / ranks, "unlike": differing}))
    destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
