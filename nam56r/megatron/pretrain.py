"""Megatron's own `pretrain` on a NAM56R recipe: `torchrun … -m nam56r.megatron.pretrain MEGATRON-ARGUMENTS`.

Megatron-core's wheel has `megatron.training.pretrain` and no script that calls it; this is one, for `--spec
nam56r.megatron.specs nam56r_stack_spec`. The arguments are Megatron's, and three of ours:

    --nam56r-recipe NAME|PATH       M, R and the routed experts take from it what Megatron has no flag for
    --nam56r-kernel OPERATOR=NAME   asks for a kernel; may be repeated
    --nam56r-device cuda|cpu        cpu: gloo, and stand-ins for what Megatron asks of torch.cuda

Arguments that disagree with the recipe, that our layers don't serve or that Megatron's own checks reject are refused,
and so is a recipe whose plan has a slot without a kernel. Parallelism, schedules, optimizer, data and checkpoints are
Megatron's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from megatron.training.config import PretrainConfigContainer
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron.training.training import stimer as stragglers
from megatron.training.utils import get_blend_and_blend_per_split

from nam56r.kernels.registry import Device
from nam56r.megatron.config import complete
from nam56r.megatron.cpu import cpu_mode
from nam56r.megatron.head import adopt
from nam56r.megatron.parallel import initialize
from nam56r.megatron.patches import apply_patches
from nam56r.plan import Plan, PlanRefused, kernels_named, make_plan
from nam56r.recipe import Recipe
from nam56r.translate import STACK_SPEC, translate
from nam56r.translate.contract import has_attention


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
    "log_straggler": (False, "no --log-straggler"),
}

WHOLE = "the layers take whole sequences, and know no document's end"
# what would train something else, or be left out, without a word: argument -> the value that is served, and why
SERVED: dict[str, tuple[Any, str]] = {
    "context_parallel_size": (1, WHOLE),
    "reset_attention_mask": (False, WHOLE),
    "reset_position_ids": (False, WHOLE),
    "dataloader_inter_document_masking": (False, WHOLE),
    "sft": (False, "this entry pretrains"),
    "perform_rl_step": (False, "this entry pretrains"),
    "logits_load_dir": (None, "this entry has no distillation"),
    "logits_save_dir": (None, "this entry has no distillation"),
    "inprocess_restart": (False, "this entry doesn't wrap pretrain in it"),
    "log_throughput": (False, "Megatron's count of FLOPs leaves out +, D and R"),
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

    Raises ValueError when the arguments disagree with the recipe or ask for what isn't served, PlanRefused when a slot
    has no kernel.
    """
    recipe = Recipe.load(args.nam56r_recipe)
    transformer = core_transformer_config_from_args(args)
    stock = args.spec is None and translate(recipe).stack_spec is None
    faults = [*disagreements(args, recipe), *unserved(args)]
    complete(transformer, recipe, plan_of(args, recipe), layout=args.hybrid_layer_pattern, stock=stock, also=faults)
    return hybrid_config_from_args(args, config=transformer, model_config_cls=ModelConfig)


def disagreements(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """What Megatron takes from its arguments past its transformer configuration, where the recipe says otherwise."""
    translated = translate(recipe)
    found = vars(args) | {"hybrid_layer_pattern": (args.hybrid_layer_pattern or "").replace("|", "")}
    wanted = {
        "hybrid_layer_pattern": translated.native_pattern.replace("|", ""),
        "seq_length": recipe.seq_length,
        "padded_vocab_size": recipe.vocab_size,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope" if has_attention(recipe) else "none",
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None,
        "fp16_lm_cross_entropy": False,
    }
    if args.spec is not None or translated.stack_spec:
        wanted["spec"] = STACK_SPEC.split()
    for name, value in wanted.items():
        if found[name] != value:
            yield f"{name} is {found[name]}, but the recipe has {value}"


def unserved(args: argparse.Namespace) -> Iterator[str]:
    """What this entry or our layers don't do."""
    for name, (value, why) in SERVED.items():
        if getattr(args, name) != value:
            yield f"{name} is {getattr(args, name)}, but must be {value}: {why}"
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield "sequence_parallel is False, but must be True with tensor parallelism: our layers split sequences with it"
    if args.num_experts and args.expert_tensor_parallel_size != 1:
        size = args.expert_tensor_parallel_size
        yield f"expert_tensor_parallel_size is {size}, but must be 1: each of our experts is whole on its rank"
    if args.params_dtype != torch.float32 and not args.use_distributed_optimizer:
        yield (
            f"use_distributed_optimizer is False, but must be True in {str(args.params_dtype).removeprefix('torch.')}: "
            "Megatron's other optimizer can't save the parameters that stay fp32"
        )
    if args.full_validation and not args.multiple_validation_sets:
        yield "multiple_validation_sets is False, but must be True with full_validation: Megatron counts its steps as a list"
    if args.nam56r_device == "cpu":
        cpu = [flag for name, (value, flag) in CPU_ARGUMENTS.items() if getattr(args, name) != value]
        if args.num_experts and args.moe_token_dispatcher_type != "allgather":
            cpu.append("--moe-token-dispatcher-type allgather")
        if cpu:
            yield f"--nam56r-device cpu takes also {', '.join(cpu)}"


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
    sizes = args.per_dataset_sequences_path
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(sizes).read_text()) if sizes else None,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks the function whether all ranks call it


def forward_step(batches: Iterator[Mapping[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """A microbatch through this process's stage, and what makes Megatron's (loss, tokens, report) of its output."""
    reading = get_timers()("batch-generator", log_level=2)
    reading.start()
    with stragglers(bdata=True):
        place = torch.cuda.current_device()
        batch = {name: tensor.to(place, non_blocking=True) for name, tensor in next(batches).items()}
    reading.stop()
    with stragglers:
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

    Megatron's checks of the loss, where its arguments ask for them: no finite number ends the run, more than ten times
    the largest so far is reported.
    """
    args, machine = get_args(), get_rerun_state_machine()
    loss, tokens = (losses.float() * mask).sum(), mask.sum().int()
    unlikely = partial(machine.is_unexpectedly_large, threshold=10, context="loss")
    for asked, rejected, name, fatal in (
        (args.check_for_nan_in_loss_and_grad, torch.isnan, "NaN", True),
        (args.check_for_nan_in_loss_and_grad, torch.isinf, "Inf", True),
        (args.check_for_spiky_loss, unlikely, "a spike", False),
    ):
        if asked:
            machine.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"{name} in the local forward loss",
                tolerance=0.0,
                fatal=fatal,
            )
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.to(loss.dtype)))}


def prepare() -> PretrainConfigContainer:
    """Megatron's whole configuration from its arguments and ours: patched, parsed, and on a CPU joined.

    Raises ValueError for arguments that are refused, PlanRefused for a plan that is.
    """
    for scope in ("model", "checkpoint", "pretrain"):
        apply_patches(scope)
    # Megatron's own help can't be printed: one of its texts has a bare %
    early = argparse.ArgumentParser("nam56r.megatron.pretrain", description=__doc__, allow_abbrev=False)
    early.formatter_class = argparse.RawDescriptionHelpFormatter
    early.add_argument("--nam56r-device")
    early.add_argument("--yaml-cfg")
    ours, _ = early.parse_known_args()
    if ours.yaml_cfg:
        raise ValueError(f"--yaml-cfg is {ours.yaml_cfg}, but must be left out: it replaces all arguments, ours too")
    if ours.nam56r_device == "cpu":
        cpu_mode()
        apply_patches("pretrain-cpu")
    try:
        args = parse_and_validate_args(add_arguments)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"Megatron refuses its arguments: {error or where.line} ({Path(where.filename).name}:{where.lineno})"
        ) from error
    # Megatron would end with exit code 0
    if args.load and args.exit_on_missing_checkpoint and not Path(get_checkpoint_tracker_filename(args.load)).exists():
        raise ValueError(f"--load {args.load} has no checkpoint: train from the start without --load, or name another")
    config = pretrain_cfg_container_from_args(args, configure(args))
    if ours.nam56r_device == "cpu":
        # Megatron's own start-up joins the process groups on CUDA only
        initialize(
            "cpu",
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            vpp=args.virtual_pipeline_model_parallel_size,
            ep=args.expert_model_parallel_size,
            seed=args.seed,
        )
    return config


def main() -> None:
    """Train. A refusal is one message on stderr: exit code 3 for a refused plan, 2 for other bad input."""
    try:
        config = prepare()
    except ValueError as error:
        # once a node: a file may be missing on one of them
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"nam56r: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, PlanRefused) else 2)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
