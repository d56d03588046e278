"""Megatron's own `pretrain` on a NAM56R recipe: `torchrun … -m nam56r.megatron.pretrain MEGATRON-ARGUMENTS`.

Megatron-core's wheel has `megatron.training.pretrain` and no script that calls it; this is one, for `--spec
nam56r.megatron.specs nam56r_stack_spec`. The arguments are Megatron's, and three of ours:

    --nam56r-recipe NAME|PATH       M, R and the routed experts take from it what Megatron has no flag for
    --nam56r-kernel OPERATOR=NAME   asks for a kernel; may be repeated
    --nam56r-device cuda|cpu        cpu: gloo, and stand-ins for what Megatron asks of torch.cuda

Arguments that disagree with the recipe are refused, and so is a recipe whose plan has a slot without a kernel.
Parallelism, schedules, optimizer, data and checkpoints are Megatron's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron.training.utils import get_blend_and_blend_per_split

from nam56r.kernels.registry import Device
from nam56r.megatron.config import complete
from nam56r.megatron.cpu import cpu_mode
from nam56r.megatron.head import adopt
from nam56r.megatron.parallel import initialize
from nam56r.megatron.patches import apply_patches
from nam56r.plan import Plan, PlanRefused, kernels_named, make_plan
from nam56r.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our three arguments, for Megatron's parser."""
    group = parser.add_argument_group("nam56r")
    group.add_argument("--nam56r-recipe", required=True, metavar="NAME|PATH")
    group.add_argument("--nam56r-kernel", action="append", default=[], metavar="OPERATOR=NAME")
    group.add_argument("--nam56r-device", choices=("cuda", "cpu"), default="cuda")
    return parser


# what CPU mode can't answer for has to be off: argument -> its value, and the flag that says so
CPU_ARGUMENTS = {
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "use_gloo_process_groups": (False, "--disable-gloo-process-groups"),
    "use_cpu_initialization": (True, "--use-cpu-initialization"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
    "bias_dropout_fusion": (False, "--no-bias-dropout-fusion"),
}


class Builder(HybridModelBuilder):
    """Megatron's builder of hybrid models, whose head is ours."""

    def build_model(self, *args: Any, **kwargs: Any) -> HybridModel:
        return adopt(super().build_model(*args, **kwargs))


@dataclasses.dataclass(kw_only=True)
class ModelConfig(HybridModelConfig):
    """Megatron's, built by `Builder`."""

    builder = f"{__name__}.{Builder.__name__}"


def configure(args: argparse.Namespace) -> HybridModelConfig:
    """Megatron's model configuration with the recipe and its plan, from parsed and validated arguments.

    Raises ValueError when the arguments disagree with the recipe, PlanRefused when a slot has no kernel.
    """
    recipe = Recipe.load(args.nam56r_recipe)
    transformer = core_transformer_config_from_args(args)
    complete(transformer, recipe, plan_of(args, recipe))
    return hybrid_config_from_args(args, config=transformer, model_config_cls=ModelConfig)


def plan_of(args: argparse.Namespace, recipe: Recipe) -> Plan:
    """The plan of what the arguments ask for, on this process's device."""
    return make_plan(
        recipe,
        Device.of(args.nam56r_device),
        kernels=kernels_named(args.nam56r_kernel),
        micro_batch=args.micro_batch_size,
        tensor_parallel=args.tensor_model_parallel_size,
        dtype=args.params_dtype,
    )


def datasets(samples: list[int], vp_stage: int | None = None) -> list[GPTDataset | None]:
    """Training, validation and test data of that many samples; every process opens them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks the function whether all ranks call it


def forward_step(batches: Iterator[Mapping[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """A microbatch through this process's stage, and what makes Megatron's (loss, tokens, report) of its output."""
    place = torch.cuda.current_device()
    batch = {name: tensor.to(place, non_blocking=True) for name, tensor in next(batches).items()}
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"] if get_attr_wrapped_model(model, "post_process") else None,
        loss_mask=batch["loss_mask"],
    )
    return output, partial(masked_sum, batch["loss_mask"])


def masked_sum(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """mask, losses [B, S] -> the sum of the losses that count, how many do, and both for the log.

    Megatron's check of the loss ends the run when it is no finite number.
    """
    loss, tokens = (losses.float() * mask).sum(), mask.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"{name} in the local forward loss",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.to(loss.dtype)))}


def train() -> None:
    """Parse Megatron's arguments and ours, and train."""
    apply_patches("model")
    apply_patches("checkpoint")
    apply_patches("pretrain")
    ours, _ = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args()
    if ours.nam56r_device == "cpu":
        cpu_mode()
        apply_patches("pretrain-cpu")
    args = parse_and_validate_args(add_arguments)
    if ours.nam56r_device == "cpu":
        join_on_cpu(args)
    config = pretrain_cfg_container_from_args(args, configure(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


def join_on_cpu(args: argparse.Namespace) -> None:
    """Join the process groups, which Megatron's own start-up would do on CUDA only."""
    wrong = [flag for name, (value, flag) in CPU_ARGUMENTS.items() if getattr(args, name) != value]
    if args.num_experts and args.moe_token_dispatcher_type != "allgather":
        wrong.append("--moe-token-dispatcher-type allgather")
    if wrong:
        raise ValueError(f"--nam56r-device cpu takes also {', '.join(wrong)}")
    initialize(
        "cpu",
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vpp=args.virtual_pipeline_model_parallel_size,
        ep=args.expert_model_parallel_size,
        seed=args.seed,
    )


def main() -> None:
    """`train`, whose refusals are one message on stderr: exit code 3 for a refused plan, 2 for other bad input."""
    try:
        train()
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"nam56r: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, PlanRefused) else 2)


if __name__ == "__main__":
    main()
