"""The runtime patch surface: every change to Megatron's and torch's behaviour, in one table, and nothing outside it.

Importing changes nothing. A scope's patches come into force together, from `apply_patches`, and stay for the process.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, fields
from pkgutil import resolve_name
from typing import Any, Literal

import megatron.core
import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import multi_token_prediction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from nam56r.kernels.mamba2.combined import mamba_chunk_scan_combined
from nam56r.megatron.mamba2 import GatedRMSNorm, training_scan
from nam56r.megatron.nan_scores import stopping
from nam56r.megatron.stage_tensor import widened

VERSIONS = ("0.19.",)

Scope = Literal["model", "checkpoint", "cpu", "pretrain", "pretrain-cpu"]
# scope -> when it is applied
SCOPES: dict[Scope, str] = {
    "model": "before a model is built",
    "checkpoint": "before the first save",
    "cpu": "on entering CPU mode",
    "pretrain": "before Megatron's own pretrain",
    "pretrain-cpu": "before Megatron's own pretrain on a CPU",
}


@dataclass(frozen=True)
class Patch:
    """One change: of what is at the dotted path `target`, known for megatron-core's versions with these prefixes.

    apply() makes the change, and may be called again; verify() says whether it is in force.
    """

    name: str
    scope: Scope
    target: str
    reason: str
    apply: Callable[[], Any]
    verify: Callable[[], bool]
    versions: tuple[str, ...] = VERSIONS

    def refusal(self) -> str | None:
        """Why this patch isn't for the megatron-core that is installed, or None when it is."""
        known, version = ", ".join(f"{prefix}x" for prefix in self.versions), _version()
        return None if version.startswith(self.versions) else f"known for megatron-core {known}, not for {version}"


def _put(name: str, scope: Scope, target: str, value: Any, reason: str) -> Patch:
    """The patch that puts `value` at `target`."""
    owner, _, attribute = target.rpartition(".")
    return Patch(
        name,
        scope,
        target,
        reason,
        apply=lambda: setattr(resolve_name(owner), attribute, value),
        verify=lambda: getattr(resolve_name(owner), attribute, None) is value,
    )


_acceptance = multi_token_prediction._compute_mtp_acceptance_counts


def _acceptance_without_logits(logits, labels, loss_mask, output_layer, *rest):  # type: ignore[no-untyped-def]
    if getattr(output_layer, "deferred", False):
        return torch.zeros_like(loss_mask.sum()), torch.zeros_like(loss_mask.sum())
    return _acceptance(logits, labels, loss_mask, output_layer, *rest)


_get_model_config = schedules.get_model_config


def _config_with_indices(model):  # type: ignore[no-untyped-def]
    return widened(_get_model_config(model))


_sharded_state_dict, _load_state_dict = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict


def _sharded_state_dict_with_moments(self, model_state, is_loading=False, *rest, **named):  # type: ignore[no-untyped-def]
    if is_loading and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return _sharded_state_dict(self, model_state, is_loading, *rest, **named)


@torch.no_grad()
def _load_state_dict_with_steps(self, state_dict):  # type: ignore[no-untyped-def]
    groups = state_dict.get("optimizer", {}).get("param_groups", ())
    counts = {group["step"] for group in groups if "step" in group}
    _load_state_dict(self, state_dict)
    for moments in self.optimizer.state.values():
        if "step" in moments:
            (count,) = counts
            moments["step"] = torch.full_like(moments["step"], count)


def _optimizer_config_with_our_groups(args: Any) -> Any:
    config = OptimizerConfig(
        **{f.name: getattr(args, f.name) for f in fields(OptimizerConfig) if hasattr(args, f.name)}
    )
    return config, group_overrides(config)


def group_overrides(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's own parameter groups (no decay of vectors), no decay where a module says so, and fp32 apart.

    Megatron's distributed optimizer takes one parameter's state for another's when it saves a group that mixes
    fp32 parameters with bf16 ones; the last override changes no value and keeps them in groups of their own.
    """
    fp32 = ParamPredicate("fp32", lambda parameter: parameter.dtype == torch.float32)
    return get_standard_config_overrides(config) | {
        ParamKey(attr="_no_weight_decay"): ParamGroupOverride(wd_mult=0.0),
        ParamKey(predicate=fp32): ParamGroupOverride(start_wd=config.weight_decay, end_wd=config.weight_decay),
    }


_LOG = "megatron.training.training.training_log"


def _stop_at_nan_scores() -> None:
    owner, _, name = _LOG.rpartition(".")
    setattr(resolve_name(owner), name, stopping(resolve_name(_LOG)))


def _helpers_are_compiled() -> None:
    """In place of a build of megatron.core.datasets.helpers_cpp."""


def _initialize_without_cuda(**options: Any) -> Any:
    from megatron.training.initialize import initialize_megatron

    return initialize_megatron(allow_no_cuda=True, **options)


class OnCPU(TorchFunctionMode):
    """Every call that names a CUDA device gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # gradient clipping asserts that it is so
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


class _Stream:
    """A stream on which everything is done already."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> None: ...

    def synchronize(self) -> None: ...


PATCHES: tuple[Patch, ...] = (
    _put(
        "r-symbol",
        "model",
        "megatron.core.models.hybrid.hybrid_layer_allocation.Symbols.VALID_LAYERS",
        Symbols.VALID_LAYERS | {"R"},
        "Megatron's pattern grammar has no letter for a recurrent layer, and R may not pose as another",
    ),
    _put(
        "r-name",
        "model",
        "megatron.core.models.hybrid.hybrid_layer_allocation.Symbols.M2RNN",
        "R",
        "Megatron counts layers by the letters that Symbols has a name for, and would leave R out without a word",
    ),
    _put(
        "mtp-acceptance",
        "model",
        "megatron.core.transformer.multi_token_prediction._compute_mtp_acceptance_counts",
        _acceptance_without_logits,
        "MTP's acceptance metric takes an argmax over whole logits, which a fused loss never has: 0 of 0 instead",
    ),
    _put(
        "stage-tensor",
        "model",
        "megatron.core.pipeline_parallel.schedules.get_model_config",
        _config_with_indices,
        "the schedules send one tensor as wide as the hidden size between stages; where a stage uses another's indices of "
        "sparse attention, they are further columns of it",
    ),
    _put(
        "mamba2-without-mamba-ssm",
        "model",
        "megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM",
        True,
        "Megatron's Mamba-2 mixer isn't built without mamba-ssm; the next three patches replace all that it takes from "
        "there",
    ),
    _put(
        "mamba2-scan",
        "model",
        "megatron.core.ssm.mamba_mixer.MambaMixer._ssm_training",
        training_scan,
        "the mixer calls mamba-ssm's kernels, in Megatron's own stack too: the plan's convolution and scan instead",
    ),
    _put(
        "mamba2-norm",
        "model",
        "megatron.core.ssm.mamba_mixer.ExtendedRMSNorm",
        GatedRMSNorm,
        "the mixer's norm is a Triton kernel of mamba-ssm's, and a mock where that isn't installed",
    ),
    _put(
        "mamba2-prefill",
        "model",
        "megatron.core.ssm.mamba_mixer.mamba_chunk_scan_combined",
        mamba_chunk_scan_combined,
        "outside of training the mixer calls mamba-ssm's scan by itself: ours under the same signature",
    ),
    _put(
        "checkpoint-results",
        "checkpoint",
        "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        queue.Queue(),
        "a synchronous save needs no manager process for its results; that one takes seconds to start, imports "
        "__main__ again, and outlives a run that is killed",
    ),
    _put(
        "checkpoint-notice",
        "checkpoint",
        "megatron.core.dist_checkpointing.strategies.torch._logged_mcore_async_deprecation",
        True,
        "the first save warns that asynchronous saves will be removed, and no save here is asynchronous",
    ),
    _put(
        "checkpoint-moments",
        "checkpoint",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_state_dict",
        _sharded_state_dict_with_moments,
        "without Transformer Engine and Apex, it can load only into moments that are there already",
    ),
    _put(
        "checkpoint-steps",
        "checkpoint",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
        _load_state_dict_with_steps,
        "with torch's AdamW it restores a wrong count of steps, as one tensor to which each parameter's update adds; and "
        "it copies into views of fp32 parameters, which are leaves",
    ),
    _put(
        "cpu-current-device",
        "cpu",
        "torch.cuda.current_device",
        lambda: torch.device("cpu"),
        "DDP's gradient buffers, the router's counters and the loss trackers are made on the current device",
    ),
    _put(
        "cpu-current-stream",
        "cpu",
        "torch.cuda.current_stream",
        lambda device=None: _Stream(),
        "DDP reads the current stream before it reduces gradients",
    ),
    _put("cpu-stream", "cpu", "torch.cuda.Stream", _Stream, "shared experts make a side stream when they are built"),
    _put(
        "cpu-synchronize",
        "cpu",
        "torch.cuda.synchronize",
        lambda device=None: None,
        "distributed checkpointing waits for copies from the device",
    ),
    _put(
        "cpu-recompute-get",
        "cpu",
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        lambda device=None, clone=False, graph_safe=False: torch.get_rng_state(),
        "recompute keeps the CUDA generator's state",
    ),
    _put(
        "cpu-recompute-set",
        "cpu",
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        lambda state, device=None, graph_safe=False: torch.set_rng_state(state),
        "recompute sets the CUDA generator's state",
    ),
    Patch(
        "cpu-eager",
        "cpu",
        "torch._dynamo.eval_frame._stance",
        "Megatron compiles small pointwise functions; here that takes half a minute, a C++ compiler, and gains nothing",
        apply=lambda: torch.compiler.set_stance("force_eager"),
        verify=lambda: resolve_name("torch._dynamo.eval_frame._stance").stance == "force_eager",
    ),
    _put(
        "pretrain-helpers",
        "pretrain",
        "megatron.core.datasets.utils.compile_helpers",
        _helpers_are_compiled,
        "the wheel brings the data set's C++ helpers compiled, and no makefile: pretrain runs make and exits",
    ),
    _put(
        "pretrain-parameter-groups",
        "pretrain",
        "megatron.training.training.get_megatron_optimizer_config",
        _optimizer_config_with_our_groups,
        "M and R say which parameters take no weight decay; and the distributed optimizer saves a group that mixes fp32 "
        "with 16-bit parameters wrongly",
    ),
    Patch(
        "pretrain-nan-scores",
        "pretrain",
        _LOG,
        "the sparse layers' kernels note a NaN index score on the device, which nothing reads: where Megatron logs, it is "
        "read, and ends the run",
        apply=_stop_at_nan_scores,
        verify=lambda: hasattr(resolve_name(_LOG), "__wrapped__"),
    ),
    _put(
        "pretrain-cpu-start",
        "pretrain-cpu",
        "megatron.training.training.initialize_megatron",
        _initialize_without_cuda,
        "pretrain asserts that there is CUDA, though its own initialize_megatron can do without",
    ),
    _put(
        "pretrain-cpu-arch",
        "pretrain-cpu",
        "megatron.training.arguments.get_device_arch_version",
        lambda: 10,
        "with tensor parallelism the arguments' check asks for the GPU's generation, and below 10 for a CUDA variable",
    ),
    _put(
        "pretrain-cpu-get-rng-state",
        "pretrain-cpu",
        "torch.cuda.get_rng_state",
        lambda device=None: torch.get_rng_state(),
        "checkpoints and the rerun machine keep the CUDA generator's state",
    ),
    _put(
        "pretrain-cpu-set-rng-state",
        "pretrain-cpu",
        "torch.cuda.set_rng_state",
        lambda state, device=None: torch.set_rng_state(state),
        "a loaded checkpoint sets the CUDA generator's state",
    ),
    Patch(
        "pretrain-cpu-tensors",
        "pretrain-cpu",
        "torch.overrides._get_current_function_mode_stack",
        "pretrain, its log and its optimizers make tensors on 'cuda' by name",
        apply=lambda: OnCPU().__enter__(),
        verify=lambda: any(type(mode) is OnCPU for mode in _get_current_function_mode_stack()),
    ),
)


def _version() -> str:
    """megatron-core's version; in a git checkout it adds that one's commit to its own."""
    return megatron.core.__version__.partition("+")[0]


def patches_of(scope: Scope) -> tuple[Patch, ...]:
    """A scope's patches, in order. Raises ValueError for a scope that isn't one."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, but must be one of {', '.join(SCOPES)}")
    return tuple(patch for patch in PATCHES if patch.scope == scope)


def apply_patches(scope: Scope) -> None:
    """Put a scope's patches in force; those that are already stay as they are.

    Raises RuntimeError, before anything changes, naming every patch that doesn't know this megatron-core; and when one
    didn't take.
    """
    patches = patches_of(scope)
    if refused := [f"patch {patch.name} is {why}" for patch in patches if (why := patch.refusal())]:
        raise RuntimeError("; ".join(refused))
    for patch in patches:
        if not patch.verify():
            patch.apply()
            if not patch.verify():
                raise RuntimeError(f"patch {patch.name} did not take on {patch.target}")


def examine() -> dict[str, Any]:
    """Apply the whole table to this process and say, as JSON, which patches took and why others didn't.

    What it reports is about Megatron only in a process where no patch is in force yet, and that process is good for
    nothing else afterwards: `nam56r.report.patches.examine` starts one for it.
    """
    return {
        "megatron-core": _version(),
        "patches": [
            {
                "name": patch.name,
                "scope": patch.scope,
                "target": patch.target,
                "reason": patch.reason,
                "versions": [f"{prefix}x" for prefix in patch.versions],
                "verified": (fault := _try(patch)) is None,
                "fault": fault,
            }
            for patch in PATCHES
        ],
    }


def _try(patch: Patch) -> str | None:
    """Apply a patch that isn't in force; what went wrong, or None."""
    try:
        if why := patch.refusal():
            return why
        if patch.verify():
            return "was in force before it was applied"
        patch.apply()
        return None if patch.verify() else "did not take"
    except Exception as error:  # whatever a changed Megatron raises is the finding
        return f"{type(error).__name__}: {error}"
