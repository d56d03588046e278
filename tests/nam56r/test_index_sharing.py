"""Index sharing: sparse layers that use the indices of an earlier one, in one process and over several."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper, DSAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.multiprocessing.reductions import StorageWeakRef

from nam56r.kernels.registry import DEVICES
from nam56r.megatron import model as model_module
from nam56r.megatron import sparse_attention, specs, stage_tensor
from nam56r.megatron.model import build_model
from nam56r.megatron.parallel import destroy, initialize
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.stack import Stack
from nam56r.plan import make_plan
from nam56r.recipe import PRESETS
from tests.nam56r.layers import config_of, drawn, forget_losses

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402
from pipeline_worker import CUTS, RUNS, recipe_of  # noqa: E402

WORKER = Path(__file__).parent / "pipeline_worker.py"
NAM56R = PRESETS["nam56r"].with_overrides(["dsa.share_every=3"])


def sharing(*settings):
    """Sparse A at 1, 3, 5, 7; 1 and 5 compute. Many index heads, so that no two scores are the same zero."""
    base = ("pattern=AEAMAEAR", "depth=8", "dsa.ranks=[0, 1, 2, 3]", "dsa.share_every=2", "dsa.index_num_heads=24")
    # Megatron's MTP recomputes one layer at a time only
    return small_recipe(*base, "mtp.num_depths=0", *settings)


@pytest.fixture(scope="module", autouse=True)
def groups():
    initialize("cpu", seed=5)
    forget_losses()
    yield
    forget_losses()
    destroy()


def build(recipe, **config):
    plan = make_plan(recipe, DEVICES["cpu"], dtype=torch.float32)
    return build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32, **config)


def step(model, seed=0):
    """Loss [B, S], the indexer's losses by layer, and every gradient."""
    recipe = model.config.recipe
    DSAIndexerLossLoggingHelper.tracker.clear()
    model.zero_grad()
    tokens = torch.randint(recipe.vocab_size, (2, recipe.seq_length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(recipe.seq_length).expand(2, -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    loss.mean().backward()
    indexer = DSAIndexerLossLoggingHelper.tracker["values"].clone()
    return loss.detach(), indexer, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def weights():
    return drawn(build(sharing()), scale=0.05).state_dict()


def test_only_layers_that_compute_have_an_indexer(weights):
    recipe = sharing()
    assert recipe.index_sources == {1: 1, 3: 1, 5: 5, 7: 5}
    alone = build(recipe.with_overrides(["dsa.share_every=1"])).state_dict()
    indexers = {name for name in alone if ".indexer." in name}
    without = {name for name in indexers if name.startswith(("decoder.layers.2.", "decoder.layers.6."))}
    assert len(indexers) == 2 * len(without) > 0
    assert weights.keys() == alone.keys() - without


def test_a_layer_without_a_recipe_computes():
    config = config_of(sharing())
    config.recipe = None
    layer = build_module(specs.dsa_layer, config=config, layer_number=3, add_layer_offset=False)
    assert hasattr(layer.self_attention.core_attention, "indexer") and not layer.hands_on


def layers_of(recipe, *numbers, **overrides):
    """Sparse layers with the weights of the first, apart from what they don't have."""
    config = config_of(recipe, **overrides)
    layers = [build_module(specs.dsa_layer, config=config, layer_number=n, add_layer_offset=False) for n in numbers]
    first = drawn(layers[0]).state_dict()
    for layer in layers[1:]:
        layer.load_state_dict({name: first[name] for name in layer.state_dict()})
    return layers


@pytest.mark.parametrize("modules", [[], ["core_attn"], ["mla_up_proj"], ["core_attn", "mla_up_proj", "layernorm"]])
def test_a_sharing_layer_is_a_full_one_with_its_indices(modules):
    options = dict(recompute_granularity="selective", recompute_modules=modules) if modules else {}
    full, shared, last = layers_of(sharing("dsa.share_every=3"), 1, 3, 5, **options)
    x, d = (torch.randn(32, 2, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def run(layer, x, context=None):
        x = x.clone().requires_grad_()
        out, indices = layer(hidden_states=x, attention_mask=None, context=context)
        layer.zero_grad()
        (out * d).sum().backward()
        return out.detach(), indices, {"x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}

    out, indices, gradients = run(full, x)
    assert indices.shape == (2, 32, 8) and indices.dtype == torch.int32
    same, passed_on, others = run(shared, x, indices)
    assert torch.equal(out, same) and torch.equal(passed_on, indices)
    assert others.keys() == {name for name in gradients if "indexer" not in name}
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in others.items())
    other = run(full, x.flip(0))[1]
    assert not torch.equal(other, indices) and not torch.equal(run(shared, x, other)[0], out)
    # a full layer computes its own whatever it is given, and the last that shares hands none on
    assert torch.equal(run(full, x, other)[0], out)
    assert run(last, x, indices)[1] is None
    with pytest.raises(ValueError, match="layer 3 uses the indices of layer 1, but was given none"):
        run(shared, x)


def test_is_megatrons_own_sharing_and_takes_its_weights(weights, monkeypatch):
    """The whole model: loss, the indexer's losses layer by layer, every gradient."""
    stock_layer = copy.deepcopy(specs.dsa_layer)
    attention = stock_layer.submodules.self_attention
    stock_layer.module, attention.module = TransformerLayer, AbsorbedMLASelfAttention
    attention.submodules.core_attention.module = DSAttention
    stack = copy.copy(specs.nam56r_stack_spec)
    stack.submodules = copy.copy(stack.submodules)
    stack.submodules.dsa_layer = stock_layer
    ours = build(sharing())
    monkeypatch.setattr(model_module, "nam56r_stack_spec", stack)
    stock = build(sharing())
    cores = [m for m in stock.modules() if isinstance(m, DSAttention)]
    assert [(core.layer_number, core.source_layer) for core in cores] == [(1, 1), (3, 1), (5, 5), (7, 5)]
    stock.load_state_dict(weights)
    ours.load_state_dict(stock.state_dict())
    (loss, indexer, gradients), (wanted, wanted_indexer, exact) = step(ours), step(stock)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(indexer, wanted_indexer, rtol=1e-4, atol=1e-7)
    assert indexer.nonzero().flatten().tolist() == [0, 4]
    assert gradients.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.fixture(scope="module")
def plain(weights):
    """The step without recompute."""
    model = build(sharing())
    model.load_state_dict(weights)
    return step(model)


FULL = [("uniform", 1), ("uniform", 2), ("uniform", 3), ("block", 1), ("block", 3), ("block", 8)]


@pytest.mark.parametrize(("method", "number"), FULL)
def test_full_recompute_gives_the_same_bits(weights, plain, method, number):
    options = dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=number)
    model = build(sharing(), **options)
    model.load_state_dict(weights)
    loss, indexer, gradients = step(model)
    assert torch.equal(loss, plain[0]) and torch.equal(indexer, plain[1])
    assert gradients.keys() == plain[2].keys()
    assert not [name for name, gradient in plain[2].items() if not torch.equal(gradients[name], gradient)]


@pytest.mark.parametrize("modules", [["core_attn"], ["mla_up_proj"], ["core_attn", "mla_up_proj"]])
def test_selective_recompute_gives_the_same(weights, plain, modules):
    """But for the order in which the keys' gradients are added up."""
    model = build(sharing(), recompute_granularity="selective", recompute_modules=modules)
    model.load_state_dict(weights)
    loss, indexer, gradients = step(model)
    assert torch.equal(loss, plain[0]) and torch.equal(indexer, plain[1])
    for name, gradient in plain[2].items():
        if not name.endswith("kv_layernorm.weight"):
            assert torch.equal(gradients[name], gradient), name
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_packed_sequences_are_separate_ones(weights):
    model = build(sharing())
    model.load_state_dict(weights)
    stack, x = model.decoder.eval(), torch.randn(32, 1, 64, generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([0, 5, 5, 18, 32], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=14, max_seqlen_kv=14)
    with torch.no_grad():
        together = stack(x, None, packed_seq_params=packed)
        apart = [stack(x[a:b], None) for a, b in zip(ends.tolist(), ends[1:].tolist()) if a < b]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [{}, dict(recompute_granularity="full", recompute_method="uniform")])
def test_nothing_keeps_indices(weights, recompute, monkeypatch):
    """The graph does until the backward is done. Not so when the next step begins, or in evaluation."""
    storages, choose = [], sparse_attention.index_top_k

    def watched(*arguments, **options):
        indices = choose(*arguments, **options)
        storages.append(StorageWeakRef(indices.untyped_storage()))
        return indices

    monkeypatch.setattr(sparse_attention, "index_top_k", watched)
    model = build(sharing(), **recompute, **({"recompute_num_layers": 1} if recompute else {}))
    x = torch.randn(32, 2, 64, requires_grad=True)
    out = model.decoder(x, None)
    assert len(storages) == 2 and not any(ref.expired() for ref in storages)
    out.sum().backward()
    del out
    assert len(storages) == (4 if recompute else 2) and all(ref.expired() for ref in storages)
    with torch.no_grad():
        model.decoder.eval()(x, None)
    assert all(ref.expired() for ref in storages)


@pytest.mark.parametrize("recompute", [{}, dict(recompute_granularity="full", recompute_method="block")])
def test_the_backward_keeps_indices_once(weights, recompute):
    """A layer and those that use its indices, and checkpoints between them, keep the same storage."""
    model, kept = build(sharing(), **recompute, **({"recompute_num_layers": 8} if recompute else {})), []

    def pack(saved):
        if saved.dtype == torch.int32 and saved.shape == (2, 32, 8):
            kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model.decoder(torch.randn(32, 2, 64, requires_grad=True), None)
    assert len(kept) >= 4 and len({saved.untyped_storage().data_ptr() for saved in kept}) == 2


def test_what_the_loop_does_not_serve_is_refused():
    config = config_of(sharing())
    groups = ProcessGroupCollection.use_mpu_process_groups()

    def stack(offset=0):
        return Stack(config, specs.nam56r_stack_spec.submodules, ["D"], pp_layer_offset=offset, pg_collection=groups)

    with pytest.raises(NotImplementedError, match="no inference path"):
        stack()(torch.zeros(32, 1, 64), None, inference_context=object())
    with pytest.raises(ValueError, match="index_columns is 0, but must be what indices of another stage take"):
        stack(offset=2)
    config.fp8, config.cuda_graph_impl = "e4m3", "local"
    with pytest.raises(
        ValueError, match="fp8 is e4m3, but must be None; cuda_graph_impl is local, but must be full_iteration or none"
    ):
        stack()


def test_the_tensor_between_stages_is_wider_where_a_stage_needs_anothers_indices():
    """NAM56R's own layout: the third segment begins with layer 29, which shares those of 21."""
    segments = [range(first, first + 13) for first in range(1, 53, 13)]
    assert NAM56R.carries_indices(segments) and not NAM56R.carries_indices([range(1, 53)])
    assert not NAM56R.carries_indices([range(1, 21), range(21, 53)])  # 21 computes
    layers = NAM56R.layers.layers
    layout = "|".join(layers[part.start - 1 : part.stop - 1] for part in segments) + "/+-/+-"
    assert stage_tensor.columns(NAM56R, layout, 2, torch.bfloat16) == 512
    assert stage_tensor.columns(NAM56R, layout, 2, torch.float32) == 256
    assert stage_tensor.columns(NAM56R, layout, 1, torch.bfloat16) == 0
    assert stage_tensor.columns(NAM56R, "", 4, torch.bfloat16) == 512
    assert stage_tensor.columns(NAM56R, f"{layers[:20]}|{layers[20:]}", 2, torch.bfloat16) == 0
    assert stage_tensor.columns(PRESETS["nam56r"], layout, 2, torch.bfloat16) == 0
    config = config_of(sharing(), pipeline_model_parallel_size=2, layout="DEDMD|EDR")
    assert (config.index_columns, stage_tensor.widened(config).hidden_size, config.hidden_size) == (8, 72, 64)
    narrow = config_of(sharing(), pipeline_model_parallel_size=2, layout="DEDM|DEDR")
    assert stage_tensor.widened(narrow) is narrow
    apply_patches("model")
    assert schedules.get_model_config(SimpleNamespace(config=config)).hidden_size == 72


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_indices_come_through_the_tensor_between_stages(dtype):
    """Every bit, whatever number it spells; and the hidden states' gradient alone."""
    top_k, hidden = 8, torch.randn(5, 3, 7).to(dtype).requires_grad_()
    indices = torch.randint(-(2**31), 2**31 - 1, (3, 5, top_k), dtype=torch.int32)
    indices[0], indices[1, 0] = -1, 0x7F800001  # all ones, and a signalling NaN
    config = SimpleNamespace(hidden_size=7, index_columns=top_k * 4 // dtype.itemsize, sequence_parallel=False)
    sent = stage_tensor.join(hidden, indices, config, None)
    assert sent.shape == (5, 3, 7 + config.index_columns)
    received = sent.detach().clone().requires_grad_()
    assert torch.equal(received[..., :7], hidden) and torch.equal(
        stage_tensor.indices_in(received, config, None), indices
    )
    received[..., :7].sum().backward()
    assert torch.equal(received.grad[..., :7], torch.ones_like(hidden)) and not received.grad[..., 7:].any()
    sent.backward(torch.full_like(sent, torch.nan).index_fill(-1, torch.arange(7), 2.0))
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
    assert not stage_tensor.join(hidden, None, config, None)[..., 7:].any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each of RUNS wrote: losses by microbatch, and its gradients under one process's names."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name, sizes in RUNS.items():
        count = sizes["tp"] * sizes["pp"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *torchrun, str(WORKER), str(folder), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    model = build(recipe_of())

    def gradients(name):
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / name)))
        return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}

    return {name: (json.loads((folder / f"{name}.json").read_text()), gradients(name)) for name in RUNS}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_stages_and_ranks_train_as_one_process(runs, name):
    """Microbatches in flight don't mix: each has its own loss."""
    (losses, exact), (found, gradients) = runs["one"], runs[name]
    assert len(set(losses)) == len(losses) == 4
    assert found == pytest.approx(losses, rel=1e-5)
    assert gradients.keys() == exact.keys()
    assert all(gradient.norm() > 0 for gradient in exact.values())
    far = {n: ((gradients[n] - g).norm() / g.norm()).item() for n, g in exact.items()}
    assert not {n: error for n, error in far.items() if not error <= 1e-4}


def test_the_layouts_of_the_runs_are_those_that_matter():
    """A stage that begins with a sharing layer, and one that only passes indices on."""
    recipe = recipe_of()
    for name, cuts in CUTS.items():
        segments = [range(a, b) for a, b in zip((1, *cuts), (*cuts, recipe.depth + 1))]
        sources = [[recipe.index_sources[n] for n in part if n in recipe.index_sources] for part in segments]
        assert recipe.carries_indices(segments)
        assert any(inside and inside[0] < part[0] for part, inside in zip(segments, sources))
        assert name == "pp2" or [] in sources[:-1]
