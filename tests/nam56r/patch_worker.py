"""What a process does to Megatron and torch, found by comparing both before and after: for test_patches.py.

    python patch_worker.py FOLDER TARGETS

imports all of Megatron and forks. One process imports our modules and applies one scope after another, for
FOLDER/table.json; the other trains a small model and then makes changes that no table lists, for FOLDER/train.json.
TARGETS is the JSON list of the table's targets.

A snapshot has every name in the namespaces of Megatron's modules and of torch's named in TORCH, and all that is reached
from them: classes, functions (code, defaults, closures, attributes), properties, containers, instances of Megatron's
classes; and settings of the process. It doesn't see inside tensors and compiled code.
"""

import ast
import functools
import gc
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

TORCH = ("torch.cuda", "torch.compiler", "torch.distributed", "torch.nn", "torch.optim", "torch._dynamo.eval_frame")
SETTINGS = (
    "are_deterministic_algorithms_enabled",
    "get_default_dtype",
    "get_float32_matmul_precision",
    "get_num_threads",
    "is_grad_enabled",
    "overrides._get_current_function_mode_stack",
    "utils._python_dispatch._get_current_dispatch_mode_stack",
    "get_deterministic_debug_mode",
    "is_anomaly_enabled",
    "is_inference_mode_enabled",
    *(f"backends.cuda.{kind}_sdp_enabled" for kind in ("flash", "mem_efficient", "math", "cudnn")),
)
# and settings that are attributes
FLAGS = tuple(
    f"backends.{name}"
    for name in (
        *("cuda.matmul.allow_tf32", "cuda.matmul.allow_bf16_reduced_precision_reduction", "cudnn.allow_tf32"),
        *("cudnn.enabled", "cudnn.benchmark", "cudnn.deterministic"),
    )
)
VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)


def load(package: str) -> tuple[list[str], list[str]]:
    """Import every module under a package; returns the names of those that could be, and of those that couldn't."""
    imported, absent = [], []
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, f"{package}.", onerror=absent.append):
        try:
            importlib.import_module(module.name)
            imported.append(module.name)
        except ImportError:  # an optional package isn't there
            absent.append(module.name)
    return imported, absent


def watched(targets: list[str]) -> list[str]:
    """The modules to look at: all of Megatron that is imported, TORCH, and wherever the targets are."""
    homes = {"torch"}
    for target in targets:
        parts = target.split(".")
        for end in range(1, len(parts)):
            with suppress(ImportError):
                homes.add(importlib.import_module(".".join(parts[:end])).__name__)
    inside = tuple(f"{name}." for name in ("megatron", *TORCH))
    return sorted(name for name in sys.modules if name in homes or f"{name}.".startswith(inside))


class Entry(NamedTuple):
    """What a name means: an object, and a copy of a set's members."""

    value: Any
    members: frozenset | None = None

    def same(self, other: "Entry") -> bool:
        if isinstance(self.value, VALUES):
            return type(self.value) is type(other.value) and (self.value == other.value or self.value != self.value)
        return self.value is other.value and self.members == other.members


ABSENT = Entry(object())


class Snapshot(dict[str, Entry]):
    """path -> Entry. What several names share is walked once, under the first, and functions and classes at home."""

    def __init__(self, modules: list[str]):
        self.walked: dict[int, Any] = {}
        for home in modules:
            for name, value in vars(sys.modules[home]).items():
                path = f"{home}.{name}"
                submodule = isinstance(value, ModuleType) and value.__name__ == path  # the import system puts it there
                if not submodule and (callable(value) or not name.startswith("__")):
                    self.walk(path, value, home)
            self[f"{home}.__class__"] = Entry(type(sys.modules[home]))
        self.update({path: Entry(value) for path, value in settings()})

    def walk(self, path: str, value: Any, home: str) -> None:
        self[path] = Entry(value, frozenset(value) if isinstance(value, (set, frozenset)) else None)
        if isinstance(value, VALUES) or id(value) in self.walked or path.endswith(".__class__"):
            return
        if parts := list(within(value, home)):
            self.walked[id(value)] = value
            for name, part in parts:
                self.walk(path + name, part, home)


def within(value: Any, home: str) -> Iterator[tuple[str, Any]]:
    """The parts of an object that is walked in the module `home`."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"[{key!r}]", part) for key, part in pairs)
        return
    names: dict[str, Any] = {}
    if isinstance(value, type):
        names = {"__bases__": value.__bases__, **vars(value)} if value.__module__ == home else {}
    elif isinstance(value, FunctionType):
        if value.__module__ == home:
            names = {name: getattr(value, name) for name in ("__code__", "__defaults__", "__kwdefaults__")}
            for number, cell in enumerate(value.__closure__ or ()):
                with suppress(ValueError):  # still empty
                    names[f"__closure__[{number}]"] = cell.cell_contents
            names |= vars(value)
    elif isinstance(value, (staticmethod, classmethod)):
        names = {"__func__": value.__func__}
    elif isinstance(value, property):
        names = {name: getattr(value, name) for name in ("fget", "fset", "fdel")}
    elif isinstance(value, functools.partial):
        names = {name: getattr(value, name) for name in ("func", "args", "keywords")}
    elif type(value).__module__.startswith("megatron.") and hasattr(value, "__dict__"):
        names = {"__class__": type(value), **vars(value)}
    yield from ((f".{name}", part) for name, part in names.items())


def settings() -> Iterator[tuple[str, Any]]:
    """What is set for the whole process."""
    yield from ((f"os.environ.{name}", value) for name, value in os.environ.items())
    yield "warnings.filters", repr(warnings.filters)
    yield from ((f"torch.{name}", repr(pkgutil.resolve_name(f"torch.{name}")())) for name in SETTINGS)
    yield from ((f"torch.{name}", repr(pkgutil.resolve_name(f"torch.{name}"))) for name in FLAGS)
    yield from ((f"signal.{number.name}", repr(signal.getsignal(number))) for number in signal.Signals)
    for name, logger in (("root", logging.root), *logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and not name.startswith("nam56r"):
            state = logger.level, logger.disabled, logger.propagate, logger.filters, logger.handlers
            if name == "root" or state != (logging.NOTSET, False, True, [], []):
                yield f"logging.{name}", repr(state)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths that mean something else; not what is under one that does."""
    found: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        if not before.get(path, ABSENT).same(after.get(path, ABSENT)):
            if not any(path.startswith((f"{above}.", f"{above}[")) for above in found):
                found.append(path)
    return found


def is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


def is_own_doing(path: str, before: Snapshot, after: Snapshot) -> bool:
    """Whether a difference is Megatron's, torch's or Python's own doing:

    - no code before and after, and a name that its own module assigns in a function (a global, or a class's attribute),
      or something in a container that was empty, such as a tracker;
    - a function of torch's where torch had none, such as what marks one as not to be compiled;
    - a dunder that Python adds to a class, which is no Python function;
    - an environment variable for Transformer Engine, which Megatron sets with every language model.
    """
    old, new = before.get(path, ABSENT).value, after.get(path, ABSENT).value
    last = path.rpartition(".")[2]
    if path.startswith("os.environ.NVTE_"):
        return True
    if old is ABSENT.value and last.startswith("__") and last.endswith("__") and not isinstance(new, FunctionType):
        return True
    if is_code(old) or is_code(new):
        return old is ABSENT.value and path.startswith("torch.") and getattr(new, "__module__", "").startswith("torch.")
    container, inside, _ = path.partition("[")
    if inside and container in before and not any(key.startswith(f"{container}[") for key in before):
        return True
    home = max((name for name in sys.modules if path.startswith(f"{name}.")), key=len, default=None)
    return home is not None and any(f"{path}.".startswith((f"{name}.", f"{name}[")) for name in assigned(home))


@functools.cache
def assigned(module: str) -> set[str]:
    """The globals and the attributes of classes that a module's functions assign, as paths."""
    found = set()
    for function, owner in functions(ast.parse(inspect.getsource(sys.modules[module])), module):
        nodes = list(ast.walk(function))
        declared = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in declared:
                found.add(f"{module}.{node.id}")
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
                name = node.value.id
                if name == "cls" or isinstance(vars(sys.modules[module]).get(name), type):
                    found.add(f"{owner if name == 'cls' else f'{module}.{name}'}.{node.attr}")
    return found


def functions(tree: ast.AST, path: str) -> Iterator[tuple[ast.AST, str]]:
    """Every function under a node, with the path of the class that it is in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, path
        else:
            yield from functions(node, f"{path}.{node.name}" if isinstance(node, ast.ClassDef) else path)


def unlisted(before: Snapshot, after: Snapshot, targets: list[str]) -> list[str]:
    """The differences that are neither in the table nor their owners' own doing."""
    return [p for p in differences(before, after) if p not in targets and not is_own_doing(p, before, after)]


def probes() -> dict[str, Any]:
    """What each patch is for, tried out: its name -> what happens."""
    from megatron.core.datasets import utils as datasets
    from megatron.core.models.hybrid import hybrid_layer_allocation as hybrid
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.ssm import mamba_mixer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_token_prediction
    from megatron.training import arguments, training

    def attempt(function: Any) -> Any:
        try:
            return function()
        except (  # torch and Megatron say no
            *(AssertionError, AttributeError, ImportError, OSError, RuntimeError, SystemExit, TypeError, ValueError),
        ) as error:
            return type(error).__name__

    def acceptance(deferred: bool) -> list[float]:
        logits = torch.nn.functional.one_hot(torch.tensor([[1], [2], [0]]), 4).float()  # [S, B, V]
        labels, mask, layer = torch.tensor([[1, 2, 3]]), torch.ones(1, 3), SimpleNamespace(deferred=deferred)
        count = multi_token_prediction._compute_mtp_acceptance_counts
        return [float(number) for number in count(logits, labels, mask, layer, None)]

    def stage_tensor_width(**more: int) -> int:
        """What the schedules take for the hidden size of a model."""
        return schedules.get_model_config(SimpleNamespace(config=SimpleNamespace(hidden_size=8, **more))).hidden_size

    def scan() -> list[int]:
        """Two steps of a mixer with one head, one channel and one state."""
        one = torch.ones(1)
        cp = {
            "A_log": one,
            "D": one,
            "dt_bias": one,
            "conv1d_weight": torch.ones(3, 1, 4),
            "conv1d_bias": torch.ones(3),
        }
        sizes = {"d_inner_local_tpcp": 1, "ngroups_local_tpcp": 1, "nheads_local_tpcp": 1}
        getters = {f"get_{name}": lambda value=value: value for name, value in cp.items()}
        mixer = SimpleNamespace(
            cp=SimpleNamespace(**sizes, **getters, post_conv_ssm=lambda y, packed: y),
            **{"d_state": 1, "headdim": 1, "rmsnorm": False, "D_has_hdim": False, "layer_number": 1},
            **{"chunk_size": 8, "activation": "silu", "norm_before_gate": False, "config": None},
            mamba_training_ssm_states_dtype=None,
        )
        return list(mamba_mixer.MambaMixer._ssm_training(mixer, torch.ones(2, 1, 5)).shape)

    def prefill() -> list[int]:
        x, state, dt = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1)
        return list(mamba_mixer.mamba_chunk_scan_combined(x, dt, -torch.ones(1), state, state, 8).shape)

    def norm() -> list[float]:
        module = mamba_mixer.ExtendedRMSNorm(4, eps=0.0, group_size=2, norm_before_gate=False)
        return [round(number, 4) for number in module(torch.tensor([1.0, 1.0, -3.0, 3.0])).tolist()]  # a mock has none

    def wait() -> bool:
        torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
        return True

    def side_stream() -> bool:
        torch.cuda.Stream().synchronize()
        return True

    def asks_for_cuda() -> bool:
        try:
            training.initialize_megatron()
        except AssertionError as error:  # the next thing that it misses is the arguments
            return "CUDA" in str(error)
        return False

    def restores() -> bool:
        state = torch.get_rng_state()
        torch.rand(1)
        torch.cuda.set_rng_state(state)
        return torch.equal(torch.get_rng_state(), state)

    def recompute_restores() -> bool:
        saved = random._get_all_rng_states()
        torch.rand(1)
        random._set_all_rng_states(*saved)
        return torch.equal(torch.get_rng_state(), saved[1])

    def compiles() -> bool:
        calls = []
        torch.compile(torch.neg, backend=lambda graph, inputs: calls.append(graph) or graph.forward)(torch.ones(1))
        return bool(calls)

    return {
        "r-symbol": attempt(lambda: hybrid.parse_hybrid_pattern("MR").main_pattern),
        "r-name": "R" in hybrid.Symbols.name_sorted_valid_layer_symbols(),
        "mtp-acceptance": [acceptance(deferred=True), acceptance(deferred=False)],
        "stage-tensor": [stage_tensor_width(), stage_tensor_width(index_columns=4)],
        # the next thing that it misses is its groups
        "mamba2-without-mamba-ssm": attempt(lambda: mamba_mixer.MambaMixer(SimpleNamespace(), None, 8)),
        "mamba2-scan": attempt(scan),
        "mamba2-norm": attempt(norm),
        "mamba2-prefill": attempt(prefill),
        "cpu-current-device": attempt(lambda: torch.zeros(1, device=torch.cuda.current_device()).device.type),
        "cpu-current-stream": attempt(wait),
        "cpu-stream": attempt(side_stream),
        "cpu-synchronize": attempt(torch.cuda.synchronize),
        "cpu-recompute-get": attempt(lambda: torch.equal(random._get_all_rng_states()[1], torch.get_rng_state())),
        "cpu-recompute-set": attempt(recompute_restores),
        "cpu-eager": compiles(),
        "pretrain-helpers": attempt(datasets.compile_helpers),
        "pretrain-cpu-start": asks_for_cuda(),
        "pretrain-cpu-arch": attempt(arguments.get_device_arch_version),
        "pretrain-cpu-get-rng-state": attempt(lambda: torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state())),
        "pretrain-cpu-set-rng-state": restores(),
        "pretrain-cpu-tensors": attempt(lambda: torch.empty(0, device="cuda").device.type),
    }


def table(targets: list[str]) -> dict[str, Any]:
    """Our modules imported, and the scopes applied one after another: what differs after each."""
    tried = probes()
    modules = watched(targets)
    before = Snapshot(modules)
    result: dict[str, Any] = {"ours": load("nam56r.megatron")}
    now = Snapshot(modules)
    result["import"] = differences(before, now)

    from nam56r.megatron.patches import PATCHES, SCOPES, apply_patches

    result["verified"] = {patch.name: [patch.verify()] for patch in PATCHES}
    result["scopes"] = {}
    for scope in SCOPES:
        before = now
        apply_patches(scope)
        now = Snapshot(modules)
        result["scopes"][scope] = differences(before, now)
    for patch in PATCHES:
        result["verified"][patch.name].append(patch.verify())
    result["probes"] = [tried, probes()]
    return result


def train(targets: list[str]) -> dict[str, Any]:
    """One step and a checkpoint on the CPU, as a run makes them: what differs that no table lists."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # torch changes its own nn.Module at the first compilation
    modules = watched(targets)
    before = Snapshot(modules)

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as strategy
    from parallel_worker import small_recipe

    from nam56r.kernels.registry import DEVICES
    from nam56r.megatron import checkpoint
    from nam56r.megatron.engine import Engine, Schedule
    from nam56r.megatron.model import build_model
    from nam56r.megatron.parallel import destroy, initialize
    from nam56r.plan import make_plan

    device, recipe = initialize("cpu", seed=3), small_recipe()
    plan = make_plan(recipe, DEVICES["cpu"], dtype=torch.float32)
    model = build_model(recipe, plan, device=device, dtype=torch.float32)
    engine = Engine(model, Schedule(steps=2, lr=1e-3, min_lr=1e-4), device)
    tokens = torch.randint(recipe.vocab_size, (1, recipe.seq_length + 1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(recipe.seq_length)[None],
        "loss_mask": torch.ones(1, recipe.seq_length),
    }
    engine.step(iter([batch] * 2), 2)

    def saved(save: Callable[[Path], None]) -> dict[str, Any]:
        """What a save says in Megatron's log, and how many processes it leaves."""
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("megatron")
        logger.addHandler(handler)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
        logger.removeHandler(handler)
        return {"said": said, "processes": len(multiprocessing.active_children())}

    result: dict[str, Any] = {"patched save": saved(lambda folder: checkpoint.save(engine, folder))}
    after = Snapshot(modules)
    result["changed"] = [path for path in differences(before, after) if path in targets]
    result["unlisted"] = unlisted(before, after, targets)

    filesystem_async._results_queue, strategy._logged_mcore_async_deprecation = None, False
    result["stock save"] = saved(lambda folder: dist_checkpointing.save(model.sharded_state_dict(), str(folder)))
    destroy()
    result["injected"] = inject()
    result["found"] = unlisted(before, Snapshot(modules), targets)
    return result


def inject() -> list[str]:
    """Change what the table doesn't list, in every way that comes to mind; returns the paths."""
    new = {
        # functions, methods, properties, classes
        "megatron.core.utils.divide": lambda a, b: a / b,
        "megatron.core.transformer.module.MegatronModule.sharded_state_dict": lambda self: {},
        "megatron.core.transformer.module.MegatronModule.__len__": lambda self: 0,
        "megatron.core.optimizer.optimizer.ChainedOptimizer.param_groups": property(lambda self: []),
        "megatron.core.distributed.finalize_model_grads.get_attr_wrapped_model": lambda *_: None,
        "torch.cuda.Event": type("Event", (), {}),
        "torch.nn.modules.linear.Linear.forward": lambda self, x: x,
        "torch.nn.functional.silu": torch.nn.functional.gelu,  # torch's own in another's place
        # inside a function
        "megatron.core.utils.ensure_divisibility.__code__": (lambda numerator, denominator: None).__code__,
        "megatron.core.utils.get_attr_wrapped_model.__defaults__": (False, True),
        # constants, and code where there was state
        "megatron.core.optimizer.optimizer.SEPARATE_GRAD_NORM_GROUPS": (),
        "megatron.core.parallel_state._TENSOR_MODEL_PARALLEL_GROUP": lambda: None,
        "megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper.tracker": {},
        # a ready spec
        "megatron.core.models.hybrid.hybrid_layer_specs.hybrid_stack_spec.module": torch.nn.Identity,
    }
    for path, value in new.items():
        owner, _, name = path.rpartition(".")
        setattr(pkgutil.resolve_name(owner), name, value)
    paths = [*new]

    from megatron.core import safe_globals, utils
    from megatron.core.models.audio import nemo_audio_checkpoint
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

    del utils.deprecate_inference_params
    paths.append("megatron.core.utils.deprecate_inference_params")
    safe_globals.SAFE_GLOBALS.append(object)
    paths.append(f"megatron.core.safe_globals.SAFE_GLOBALS[{len(safe_globals.SAFE_GLOBALS) - 1}]")
    nemo_audio_checkpoint._KNOWN_ENCODER_TARGETS.add("mine")
    paths.append("megatron.core.models.audio.nemo_audio_checkpoint._KNOWN_ENCODER_TARGETS")
    layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS["partition_dim"] = 7
    paths.append("megatron.core.tensor_parallel.layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS['partition_dim']")
    DSAIndexerLossLoggingHelper.tracker["values"] = print
    paths.append(f"{DSAIndexerLossLoggingHelper.__module__}.DSAIndexerLossLoggingHelper.tracker['values']")

    logging.getLogger("megatron.core.utils").setLevel(logging.ERROR)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "7"
    warnings.simplefilter("ignore", ResourceWarning)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = ("signal.SIGTERM", "torch.backends.cudnn.benchmark", "torch.get_deterministic_debug_mode")
    settings += ("logging.megatron.core.utils", "os.environ.CUDA_DEVICE_MAX_CONNECTIONS", "warnings.filters")
    return sorted([*paths, *settings, "torch.are_deterministic_algorithms_enabled"])


def main(folder: Path, targets: list[str]) -> None:
    gc.disable()  # a third of the time, with so much to keep
    warnings.simplefilter("ignore", FutureWarning)  # torch has names that warn when they are looked at
    megatron = load("megatron")
    child = os.fork()
    if child:
        (folder / "table.json").write_text(json.dumps({"megatron": megatron} | table(targets)))
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (folder / "train.json").write_text(json.dumps(train(targets)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
