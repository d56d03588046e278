"""A training step: Megatron's DDP, schedule, gradient finalisation, optimizer and learning-rate schedule.

On CUDA everything is Megatron's: `Float16Module`, `get_forward_backward_func`, `get_megatron_optimizer`. On a CPU the
microbatches go through the same forward and backward steps of Megatron's schedules one by one, and torch's AdamW steps
over `main_grad`, because those functions make CUDA tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    _get_param_groups,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from nam56r.megatron import nan_scores
from nam56r.megatron.patches import group_overrides

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to lr, cosine decay to min_lr at `steps`; and AdamW's other settings."""

    steps: int
    lr: float
    min_lr: float
    warmup_steps: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class Step:
    """What one step gave, the same on every rank.

    lm_loss is the mean over the global batch's tokens, mtp_losses are per depth; aux_losses are summed over layers, as
    the trackers have them. grad_norm is before clipping; lr is what the step used.
    """

    lm_loss: float
    mtp_losses: tuple[float, ...]
    aux_losses: dict[str, float]
    grad_norm: float
    lr: float


class NonFinite(RuntimeError):
    """A loss or a gradient norm that is no number."""


class Engine:
    """A model, its gradients, its optimizer and its schedule."""

    def __init__(self, model: MegatronModule, schedule: Schedule, device: torch.device):
        """model: unwrapped, on `device`. Megatron's groups must be initialised; no pipeline stages (ValueError)."""
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise ValueError("pp is more than 1, but training has no pipeline schedule yet: set it to 1")
        self.model, self.config, self.device = model, model.config, device
        wrapped = Float16Module(self.config, model) if self.config.bf16 else model
        cuda = device.type == "cuda"
        reduce = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=cuda)
        self.ddp = DistributedDataParallel(self.config, reduce, wrapped)
        self.config.finalize_model_grads_func = finalize_model_grads
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=schedule.lr,
            min_lr=schedule.min_lr,
            weight_decay=schedule.weight_decay,
            adam_beta1=schedule.betas[0],
            adam_beta2=schedule.betas[1],
            adam_eps=schedule.eps,
            clip_grad=schedule.clip_grad,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=cuda,
        )
        if cuda:
            self.optimizer = get_megatron_optimizer(
                optimizer, [self.ddp], config_overrides=group_overrides(optimizer), use_gloo_process_groups=False
            )
            self.config.grad_scale_func = self.optimizer.scale_loss
        else:
            self.optimizer = MainGradAdamW(self.ddp, optimizer)
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=schedule.lr,
            min_lr=schedule.min_lr,
            lr_warmup_steps=schedule.warmup_steps,
            lr_decay_steps=schedule.steps,
            lr_decay_style="cosine",
            start_wd=schedule.weight_decay,
            end_wd=schedule.weight_decay,
            wd_incr_steps=schedule.steps,
            wd_incr_style="constant",
            # what is asked for now decides; a checkpoint says only how far the schedule was
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.ddp.train()

    def step(self, batches: Iterator[Batch], microbatches: int) -> Step:
        """Forward, backward and update over `microbatches` (tokens, labels, position_ids, loss_mask: [B, S] each).

        Raises NonFinite when a loss or the gradient norm is no finite number, or an index score of sparse attention was
        NaN: the model is not to be saved then.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        run = self._cuda_pass if self.device.type == "cuda" else self._cpu_pass
        sums = torch.stack(run(batches, microbatches)).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        lm_loss, nan_score = (sums[0] / sums[1]).item(), nan_scores.on_any_rank(self.device)
        mtp_losses, aux_losses = _tracked(microbatches)
        losses = {"LM loss": lm_loss, **{f"MTP loss {i}": x for i, x in enumerate(mtp_losses, 1)}, **aux_losses}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NonFinite(f"the {name} is {value}")
        if nan_score:
            raise NonFinite(nan_scores.MESSAGE)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise NonFinite(f"the gradient norm is {float(grad_norm)}")
        self.schedule.step(1)
        return Step(lm_loss, mtp_losses, aux_losses, float(grad_norm), lr)

    def _forward(
        self, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
        """A microbatch's losses [B, S], and what makes (sum, tokens, both to report) of them."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
        mask = batch["loss_mask"]
        losses = model(
            batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"], loss_mask=mask
        )

        def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
            loss, tokens = (losses.float() * mask).sum(), mask.sum()
            return loss, tokens.int(), torch.stack((loss.detach(), tokens))

        return losses, reduce

    def _cuda_pass(self, batches: Iterator[Batch], microbatches: int) -> list[torch.Tensor]:
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=batches,
            model=[self.ddp],
            num_microbatches=microbatches,
            seq_length=self.model.max_sequence_length,
            micro_batch_size=1,  # for pipeline stages only
        )

    def _cpu_pass(self, batches: Iterator[Batch], microbatches: int) -> list[torch.Tensor]:
        """What Megatron's schedule without pipelining does, less its CUDA counter."""
        reported: list[torch.Tensor] = []
        for number in range(microbatches):
            loss, _ = schedules.forward_step(
                self._forward,
                batches,
                self.ddp,
                microbatches,
                None,
                reported,
                self.config,
                cp_group_size=1,
                is_first_microbatch=number == 0,
                current_microbatch=number,
            )
            schedules.backward_step(None, loss, None, self.config)
        finalize_model_grads([self.ddp])
        return reported


class MainGradAdamW(FP32Optimizer):
    """Megatron's fp32 optimizer over torch's AdamW on a CPU: same groups, same clipping, same state dicts."""

    def __init__(self, ddp: DistributedDataParallel, config: OptimizerConfig):
        adam = torch.optim.AdamW(
            _get_param_groups([ddp], config, group_overrides(config)),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # FP32Optimizer's own makes a CUDA tensor
        MegatronOptimizer.__init__(self, adam, config, _init_state)
        self.is_stub_optimizer = False
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_tp_group = parallel_state.get_expert_tensor_parallel_group()

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Clip to clip_grad by the norm over all model-parallel ranks, which is returned."""
        parameters = self.get_parameters()
        dense = [p for p in parameters if getattr(p, "allreduce", True)]
        experts = [p for p in parameters if not getattr(p, "allreduce", True)]
        square = torch.zeros(())
        for part, group in (
            (dense, parallel_state.get_model_parallel_group()),
            (experts, parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
        ):
            own = torch.nn.utils.get_total_norm(self._filter_grads_for_norm(part)).square()
            torch.distributed.all_reduce(own, group=group)
            square += own
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        return norm.item()


def _init_state(adam: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Empty moments, for a checkpoint to be loaded into."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}


def _tracked(microbatches: int) -> tuple[tuple[float, ...], dict[str, float]]:
    """MTP losses by depth and auxiliary losses by name, from Megatron's trackers, which are cleared."""
    mtp: tuple[float, ...] = ()
    auxiliary: dict[str, torch.Tensor] = {}
    MTPLossLoggingHelper.reduce_metrics_in_tracker()
    if "loss_values" in MTPLossLoggingHelper.tracker:
        mtp = tuple((MTPLossLoggingHelper.tracker["loss_values"] / microbatches).tolist())
        MTPLossLoggingHelper.clean_metrics_in_tracker()
    # num_layers=1 asks for the sum over layers
    get_moe_metrics_tracker().report(1 / microbatches, iteration=0, num_layers=1, total_loss_dict=auxiliary)
    DSAIndexerLossLoggingHelper.reduce_loss_in_tracker()
    if "values" in DSAIndexerLossLoggingHelper.tracker:
        auxiliary["indexer_loss"] = DSAIndexerLossLoggingHelper.tracker["values"].sum() / microbatches
        DSAIndexerLossLoggingHelper.clean_loss_in_tracker()
    return mtp, {name: float(value) for name, value in auxiliary.items()}
