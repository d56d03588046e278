"""One training run, from its options to its folder."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nam56r import data, memory
from nam56r.kernels.registry import Device
from nam56r.megatron import checkpoint
from nam56r.megatron.engine import Batch, Engine, NonFinite, Schedule, Step
from nam56r.megatron.model import build_model
from nam56r.megatron.parallel import data_parallel, destroy, initialize, pick_device, world
from nam56r.megatron.samples import Samples
from nam56r.plan import Plan, make_plan
from nam56r.train.folder import RunFolder
from nam56r.train.interrupt import Interrupt
from nam56r.train.options import TrainOptions
from nam56r.train.plot import draw
from nam56r.train.progress import Display, say

STOPPING = "stopping after this step, and saving; once more ends it at once"


class Diverged(RuntimeError):
    """A loss or gradient was no finite number. The message names the step and the checkpoint that is left."""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended: its step, that step's LM loss, the checkpoint, the plot, and whether it was interrupted."""

    step: int
    lm_loss: float
    checkpoint: Path
    plot: Path
    interrupted: bool


def run(options: TrainOptions, show: Callable[[Plan], None] = lambda plan: None) -> Outcome:
    """Train. Under torchrun every process calls it, and the first one prints and writes.

    show is given the plan, before anything is built.
    Raises ValueError for bad input, PlanRefused when a slot has no kernel, Diverged.
    """
    recipe = options.recipe
    info = data.open(options.data)
    if info.vocab_size > recipe.vocab_size:
        raise ValueError(
            f"{options.data} has token ids up to {info.vocab_size - 1}, but recipe {recipe.name} has vocab_size "
            f"{recipe.vocab_size}: --set vocab_size={info.vocab_size} or more, or data of another tokenizer"
        )
    place = pick_device(options.device)
    rank, _ = world()
    parallel = data_parallel(tp=options.tp, ep=options.ep)
    global_batch = options.microbatches(parallel) * options.micro_batch * parallel
    record = options.record(device=place.type, global_batch=global_batch, data_sha256=info.sha256)
    folder = RunFolder(options.out)
    folder.check(recipe, record, resume=options.resume)

    device = Device.of(place)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    plan = make_plan(
        recipe,
        device,
        kernels=options.kernels,
        micro_batch=options.micro_batch,
        tensor_parallel=options.tp,
        dtype=dtype,
    )
    console = Console(quiet=rank != 0)
    if rank == 0:
        show(plan)
    estimated = memory.estimate(
        recipe, plan, expert_parallel=options.ep, optimizer_shards=parallel if place.type == "cuda" else 1
    )
    memory.check(estimated, device, memory.available(device))

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        place = initialize(options.device, tp=options.tp, ep=options.ep, seed=options.seed)
        # a CPU run gives the same bits again; on CUDA some library kernels have no deterministic form
        torch.use_deterministic_algorithms(place.type == "cpu")
        if rank == 0:
            folder.open(recipe, record, plan)
        torch.distributed.barrier()
        schedule = Schedule(
            steps=options.steps,
            lr=options.lr,
            min_lr=options.final_lr,
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
        )
        engine = Engine(build_model(recipe, plan, device=place, dtype=dtype), schedule, place)
        samples = Samples(info, recipe.seq_length, options.seed, folder.index)
        return _Run(options, folder, engine, samples, plan, device, console).train()
    finally:
        torch.use_deterministic_algorithms(deterministic)
        destroy()


class _Run:
    """What the steps of a run share."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        engine: Engine,
        samples: Samples,
        plan: Plan,
        device: Device,
        console: Console,
    ):
        self.options, self.folder, self.engine, self.samples = options, folder, engine, samples
        self.plan, self.device, self.console = plan, device, console
        self.first = torch.distributed.get_rank() == 0
        parallel = data_parallel(tp=options.tp)
        self.microbatches = options.microbatches(parallel)
        self.together = options.micro_batch * parallel
        self.global_batch = self.microbatches * self.together

    def train(self) -> Outcome:
        step, stop = self.folder.step, False
        if self.folder.latest:
            checkpoint.load(self.engine, self.folder.latest)
            say(self.console, f"resuming after step {step}, from {self.folder.latest}")
        with (
            Display(self.console, step, self.options.steps, self.options.log_every) as display,
            Interrupt(lambda: say(self.console, STOPPING), display.stop) as interrupt,
        ):
            while step < self.options.steps and not stop:
                step += 1
                started = time.perf_counter()
                try:
                    taken = self.engine.step(self.batches(step), self.microbatches)
                except NonFinite as problem:
                    raise Diverged(self.diverged(step, problem)) from None
                if self.first:
                    metrics = self.metrics(step, taken, time.perf_counter() - started)
                    self.folder.log(metrics)
                    display.show(metrics)
                stop = self.anywhere(interrupt.asked)
                if stop or step == self.options.steps or step % self.options.save_every == 0:
                    self.save(step)
        return Outcome(step, self.folder.metrics()[-1]["lm_loss"], self.folder.latest, self.folder.plot, stop)

    def batches(self, step: int) -> Iterator[Batch]:
        """The microbatches of a step; where they start in the data follows from the step."""
        first = (step - 1) * self.global_batch
        for number in range(self.microbatches):
            yield self.samples.microbatch(first + number * self.together, self.options.micro_batch)

    def metrics(self, step: int, taken: Step, seconds: float) -> dict[str, Any]:
        """A line of metrics.jsonl. loss: the LM loss and the weighted MTP losses; tokens_per_s: of all processes."""
        mtp = taken.mtp_losses
        weighted = self.options.recipe.mtp.loss_coeff * sum(mtp) / len(mtp) if mtp else 0.0
        tokens_per_s = self.global_batch * self.options.recipe.seq_length / seconds
        rate = self.device.tflops and self.device.tflops * 1e12 * torch.distributed.get_world_size()
        flops = sum(self.plan.flops_per_token.values())
        cuda = self.engine.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "step": step,
            "loss": taken.lm_loss + weighted,
            "lm_loss": taken.lm_loss,
            "mtp_losses": list(mtp),
            "aux_losses": taken.aux_losses,
            "grad_norm": taken.grad_norm,
            "lr": taken.lr,
            "consumed_samples": step * self.global_batch,
            "tokens_per_s": tokens_per_s,
            "mfu": flops * tokens_per_s / rate if rate else None,
            "memory_gib": peak / 2**30,
            "seconds": seconds,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint and the plot; every process takes part."""
        unfinished = self.folder.unfinished(step)
        if self.first:
            unfinished.mkdir()
        torch.distributed.barrier()
        checkpoint.save(self.engine, unfinished)
        if self.first:
            self.folder.commit(step, self.options.keep)
            title = f"{self.options.recipe.name} on {self.device.name}"
            draw(self.folder.metrics(), self.samples.data.unigram_entropy, title, self.folder.plot)
        torch.distributed.barrier()

    def anywhere(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must stop after the same step."""
        flag = torch.tensor(float(asked), device=self.engine.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def diverged(self, step: int, problem: NonFinite) -> str:
        latest = self.folder.latest
        left = f"{latest} is whole" if latest else "nothing was saved yet"
        return f"step {step}: {problem}. Stopped; {left}. Try a smaller lr or a longer warm-up"
