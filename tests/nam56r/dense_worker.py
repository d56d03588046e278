"""One layer of dense attention, and what each rank of two gets from it, for test_dense_attention.py.

python dense_worker.py FOLDER, under torchrun: reads FOLDER/weights.pt, and for every case of CASES writes the output and
gradients that rank 0 gathers to FOLDER/CASE.pt, with the names of the replicated weights whose gradients differ.
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module

from nam56r.kernels.registry import Device
from nam56r.megatron import specs
from nam56r.megatron.config import transformer_config
from nam56r.megatron.parallel import destroy, initialize
from nam56r.plan import make_plan
from nam56r.problems import ATTENTION
from nam56r.recipe import Recipe

LENGTH = 12
ENDS = (0, 5, 5, 9, LENGTH)
CASES = {
    f"{form}{' split' * split}{' packed' * packed}": (form, split, packed)
    for form in ATTENTION
    for split in (True, False)  # sequence parallelism
    for packed in (True, False)
}


def recipe_of(*settings: str) -> Recipe:
    """A layer whose sizes all differ."""
    sizes = "hidden_size=32 mla.num_heads=4 mla.q_lora_rank=12 mla.kv_lora_rank=10 mla.qk_nope_head_dim=7"
    more = (
        f"mla.qk_rope_head_dim=6 mla.v_head_dim=5 pattern=A depth=1 dsa.ranks=[] mtp.num_depths=0 seq_length={LENGTH}"
    )
    rest = "init_std=0.4 mamba.headdim=4"
    return Recipe.load("nam56r-tiny").with_overrides([*sizes.split(), *more.split(), *rest.split(), *settings])


def build(
    form: str | None,
    recipe: Recipe | None = None,
    *,
    module: type | None = None,
    tensor_parallel: int = 1,
    submodules: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    kernels: Mapping[str, str] | None = None,
    **overrides: Any,
) -> torch.nn.Module:
    """The layer, in fp64 on a CPU where nothing else is said. form None: without a plan's kernels."""
    recipe = recipe or recipe_of()
    options = dict(tensor_parallel=tensor_parallel, dtype=dtype)
    named = {ATTENTION[form]: "reference"} if form else {}
    plan = make_plan(recipe, Device.of(device), kernels=named | (kernels or {}), **options)
    config = transformer_config(recipe, plan, device=torch.device(device), **options, **overrides)
    spec = copy.copy(specs.mla_layer.submodules.self_attention)
    spec.module, spec.submodules = module or spec.module, copy.copy(spec.submodules)
    for name, value in (submodules or {}).items():
        setattr(spec.submodules, name, value)
    layer = build_module(spec, config=config, layer_number=1)
    if form:
        layer.kernels = plan.slots[0].kernels
    return layer


def packed_row(ends: tuple[int, ...] = ENDS) -> PackedSeqParams:
    bounds = torch.tensor(ends, dtype=torch.int32)
    most = max(b - a for a, b in zip(ends, ends[1:]))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=most, max_seqlen_kv=most
    )


def hidden(batch: int, length: int = LENGTH, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(length, batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(
    layer: torch.nn.Module, x: torch.Tensor, packed: PackedSeqParams | None = None, *, d: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients, by name; d is the output's gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out, _ = layer(x, None, packed_seq_params=packed)
    out.backward(hidden(*reversed(out.shape[:2]), out.shape[2], seed=9) if d is None else d)
    return {"out": out.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def main(folder: Path) -> None:
    initialize("cpu", tp=2, seed=3)
    rank = torch.distributed.get_rank()
    whole = torch.load(folder / "weights.pt")

    def gathered(t: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(t) for _ in range(2)]
        torch.distributed.all_gather(parts, t.contiguous())
        return torch.cat(parts, dim)

    for case, (form, split, packed) in CASES.items():
        layer = build(form, tensor_parallel=2, sequence_parallel=split)
        for name, parameter in layer.named_parameters():
            dim = getattr(parameter, "partition_dim", -1)
            parameter.data.copy_(whole[name] if dim < 0 else whole[name].chunk(2, dim)[rank])
        x, d = (hidden(1 if packed else 2, seed=seed) for seed in (1, 9))
        if split:
            x, d = (t.chunk(2)[rank] for t in (x, d))
        found = run(layer, x, packed_row() if packed else None, d=d)
        if split:
            found |= {name: gathered(found[name], 0) for name in ("out", "x")}
        unlike = []
        for name, parameter in layer.named_parameters():
            dim = getattr(parameter, "partition_dim", -1)
            if dim >= 0:
                found[name] = gathered(found[name], dim)
            elif getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(found[name])
            elif not torch.equal(*gathered(found[name], 0).chunk(2)):
                unlike.append(name)
        if rank == 0:
            torch.save({"found": found, "unlike": unlike}, folder / f"{case}.pt")
    destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
