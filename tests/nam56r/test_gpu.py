"""The same entry on a GPU: bf16, Megatron's own schedule and distributed optimizer, checkpoints."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from nam56r.kernels.dsa.status import nan_scores
from nam56r.kernels.registry import Device
from nam56r.kernels.testing import captured, replays
from nam56r.plan import make_plan
from nam56r.problems import ATTENTION
from tests.nam56r.layers import drawn

sys.path.insert(0, str(Path(__file__).parent))
from dense_worker import build, hidden, packed_row, recipe_of, run  # noqa: E402
from parallel_worker import small_recipe  # noqa: E402

pytestmark = pytest.mark.gpu
SPARSE = {"index_top_k": "cuda", "sparse_latent_attention": "triton", "indexer_kl_loss": "triton"}
REFERENCES = dict.fromkeys(SPARSE, "reference")


def recipe_for_cuda():
    """Sizes of M that its CUDA scan takes."""
    return small_recipe("mamba.headdim=32", "mamba.d_state=32")


@pytest.fixture(scope="module")
def groups():
    from nam56r.megatron.parallel import destroy, initialize

    # without it library kernels may add in another order, and two runs could not be compared
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield initialize("cuda", seed=5)
    destroy()
    torch.use_deterministic_algorithms(False)


def engine(device, recipe, **kernels):
    from nam56r.megatron.engine import Engine, Schedule
    from nam56r.megatron.model import build_model

    torch.manual_seed(5)
    plan = make_plan(recipe, Device.of(device), kernels=REFERENCES | kernels, micro_batch=2)
    model = build_model(recipe, plan, device=device, dtype=torch.bfloat16)
    return Engine(model, Schedule(steps=20, lr=1e-3, min_lr=1e-4), device)


def batch(recipe, number):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(recipe.vocab_size, (2, recipe.seq_length + 1), generator=generator)
    mask = torch.ones(2, recipe.seq_length)
    positions = torch.arange(recipe.seq_length).expand(2, -1)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}


def steps(engine, recipe, numbers):
    return [engine.step(iter([batch(recipe, number)]), 1).lm_loss for number in numbers]


def optimizer_tensors(engine):
    """Every tensor of the optimizer's state, fp32 weights included, by place."""
    found = {}
    for part, chained in enumerate(engine.optimizer.chained_optimizers):
        for group, values in enumerate(chained.optimizer.param_groups):
            for place, parameter in enumerate(values["params"]):
                found[part, group, place, "weight"] = parameter.detach().clone()
                for name, value in chained.optimizer.state[parameter].items():
                    found[part, group, place, name] = torch.as_tensor(value).clone()
    return found


def test_a_resumed_run_has_everything_back(groups, tmp_path):
    from nam56r.megatron import checkpoint

    recipe = recipe_for_cuda()
    first = engine(groups, recipe)
    steps(first, recipe, range(3))
    checkpoint.save(first, tmp_path)
    kept = optimizer_tensors(first)
    straight = steps(first, recipe, range(3, 6))

    second = engine(groups, recipe)
    checkpoint.load(second, tmp_path)
    loaded = optimizer_tensors(second)
    assert kept.keys() == loaded.keys()
    differing = [key for key, value in kept.items() if not torch.equal(value.cpu(), loaded[key].cpu())]
    assert not differing
    assert steps(second, recipe, range(3, 6)) == straight


def test_dtypes_are_where_they_belong(groups):
    first = engine(groups, recipe_for_cuda())
    fp32 = {n.rpartition(".")[2] for n, p in first.model.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"dt_bias", "B_bias", "C_bias", "D", "psi", "zeta", "phi", "A_log", "weight"}
    for chained in first.optimizer.chained_optimizers:
        for group in chained.model_float16_groups if hasattr(chained, "model_float16_groups") else []:
            assert all(parameter.dtype == torch.bfloat16 for parameter in group)


def at_the_recipes_dims(recipe_of, *settings):
    dims = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return recipe_of(*(f"mla.{name}=64" for name in dims), *settings)


def test_training_with_dense_attention_in_both_forms(groups):
    """On the CUDA kernels training goes the same way absorbed and expanded, as far as bf16 weights and routing do."""
    recipe = at_the_recipes_dims(small_recipe, "mamba.headdim=32", "mamba.d_state=32", "dsa.index_head_dim=64")
    assert make_plan(recipe, Device.of(groups), kernels=REFERENCES).slots[-1].kernels["latent_attention"] == "cuda"
    absorbed, expanded = (
        torch.tensor(steps(engine(groups, recipe, **{operator: "cuda"}), recipe, range(6)))
        for operator in ATTENTION.values()
    )
    torch.testing.assert_close(absorbed, expanded, rtol=2e-2, atol=0)


def test_training_with_sparse_attention_s_kernels(groups):
    """It goes as with the references, as far as bf16 weights, routing and the selection of keys do."""
    recipe = at_the_recipes_dims(small_recipe, "mamba.headdim=32", "mamba.d_state=32", "dsa.index_head_dim=64")
    fast, slow = (torch.tensor(steps(engine(groups, recipe, **names), recipe, range(6))) for names in (SPARSE, {}))
    torch.testing.assert_close(fast, slow, rtol=2e-2, atol=0)


def dense_layer(device, form, dtype=torch.bfloat16, like=None, **kernels):
    recipe = at_the_recipes_dims(recipe_of, "hidden_size=256", "seq_length=300", "init_std=0.1")
    layer = drawn(build(form, recipe, device=device, dtype=dtype, kernels=kernels), scale=0.02).to(device)
    if like:
        layer.load_state_dict(like.state_dict())
    return layer


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ATTENTION)
def test_dense_attention(groups, form, packed):
    """Our kernels lose at most twice what the definitions lose in the same layer in bf16."""
    definitions = dict.fromkeys((ATTENTION[form], "mla_queries", "mla_latents"), "reference")
    batch = 1 if packed else 2
    x, d = (hidden(batch, 300, width=256, seed=seed).bfloat16().to(groups) for seed in (1, 9))
    row = packed_row((0, 70, 70, 201, 300)) if packed else None
    if packed:
        row.cu_seqlens_q = row.cu_seqlens_kv = row.cu_seqlens_q.to(groups)
    stock = dense_layer(groups, form, **definitions)
    wide = dense_layer(groups, form, torch.float64, stock, **definitions)
    layer = dense_layer(groups, form, like=stock, **{ATTENTION[form]: "cuda"})
    exact = run(wide, x.double(), row, d=d.double())
    plain, ours = (run(one, x, row, d=d) for one in (stock, layer))
    for name, want in exact.items():
        mine, theirs = ((found[name].double() - want).norm() / want.norm() for found in (ours, plain))
        assert mine <= 2 * theirs, (name, mine.item(), theirs.item())


@pytest.mark.parametrize("form", ATTENTION)
def test_dense_attention_in_a_graph(groups, form):
    layer = dense_layer(groups, form, **{ATTENTION[form]: "cuda"})

    def inputs(seed):
        return {"x": hidden(2, 300, width=256, seed=seed).bfloat16().to(groups).requires_grad_()}

    replays(lambda x: layer(x, None)[0], inputs)


def sparse_layers(device, *settings, dtype=torch.bfloat16, like=None, **kernels):
    """A layer that computes indices and one that uses them."""
    from megatron.core.transformer.spec_utils import build_module

    from nam56r.megatron import specs
    from nam56r.megatron.config import transformer_config
    from nam56r.megatron.stack import assign_kernels

    sizes = "pattern=A depth=2 hidden_size=256 seq_length=300 init_std=0.1 dsa.ranks=[0,1] dsa.share_every=2"
    indexer = "dsa.index_num_heads=8 dsa.index_head_dim=64 dsa.top_k=64 dsa.loss_coeff=1.0"
    recipe = at_the_recipes_dims(recipe_of, *sizes.split(), *indexer.split(), *settings)
    plan = make_plan(recipe, Device.of(device), kernels=kernels, micro_batch=2, dtype=dtype)
    config = transformer_config(recipe, plan, device=device, dtype=dtype)
    layers = torch.nn.ModuleList()
    for slot in plan.slots:
        layer = build_module(specs.dsa_layer, config=config, layer_number=slot.layer, add_layer_offset=False)
        assign_kernels(layer, slot.kernels)
        layers.append(drawn(layer, scale=0.02).to(device))
    if like:
        layers.load_state_dict(like.state_dict())
    return layers


def run_sparse(layers, x, d):
    """The output of both, the indexer's loss, and the gradients of x and of every weight."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

    tracker = DSAIndexerLossLoggingHelper.tracker
    if "values" in tracker:
        tracker["values"].zero_()
    full, shared = layers
    out, indices = full(hidden_states=x, attention_mask=None)
    out, _ = shared(hidden_states=out, attention_mask=None, context=indices)
    gradients = torch.autograd.grad(out, [x, *layers.parameters()], d)
    names = ["x", *(name for name, _ in layers.named_parameters())]
    return {"out": out.detach(), "loss": tracker["values"][0].clone(), **dict(zip(names, gradients, strict=True))}


@pytest.fixture
def loss_scale(groups):
    """As Megatron's schedules set it before every backward."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler

    from tests.nam56r.layers import forget_losses

    forget_losses()
    DSAIndexerLossAutoScaler.set_loss_scale(torch.ones((), device=groups))
    yield
    DSAIndexerLossAutoScaler.main_loss_backward_scale = None
    forget_losses()


def rows(device, seed, dtype=torch.bfloat16):
    x, d = (hidden(2, 300, width=256, seed=seed + i).to(device, torch.bfloat16).to(dtype) for i in range(2))
    return x.requires_grad_(), d


def test_sparse_attention(groups, loss_scale):
    """With every key chosen, our kernels lose at most twice what the definitions lose in the same layers in bf16."""
    stock = sparse_layers(groups, "dsa.top_k=300", **REFERENCES)
    wide = sparse_layers(groups, "dsa.top_k=300", dtype=torch.float64, like=stock, **REFERENCES)
    exact = run_sparse(wide, *rows(groups, 1, torch.float64))
    plain, ours = (
        run_sparse(one, *rows(groups, 1))
        for one in (stock, sparse_layers(groups, "dsa.top_k=300", like=stock, **SPARSE))
    )
    for name, want in exact.items():
        mine, theirs = ((found[name].double() - want.double()).norm() / want.norm() for found in (ours, plain))
        assert mine <= 2 * theirs + 1e-6, (name, mine.item(), theirs.item())


def test_sparse_attention_in_a_graph(groups, loss_scale):
    """Forward, indexer's loss and backward of a layer that computes indices and one that uses them, captured once: with
    other inputs every bit is eager's, and a NaN still reaches the flag."""
    layers = sparse_layers(groups, **SPARSE)
    wanted = [run_sparse(layers, *rows(groups, seed)) for seed in (1, 11)]
    assert not torch.equal(wanted[0]["out"], wanted[1]["out"]) and all(w["loss"] > 0 for w in wanted)
    x, d = rows(groups, 1)
    graph, found = captured(lambda: run_sparse(layers, x, d))

    def replay(new_x, new_d):
        x.data.copy_(new_x.data)
        d.copy_(new_d)
        graph.replay()

    for seed, want in ((11, wanted[1]), (1, wanted[0])):
        replay(*rows(groups, seed))
        assert not [name for name, value in want.items() if not torch.equal(found[name], value)]
    assert not nan_scores(groups)
    bad = rows(groups, 1)
    bad[0].data[100, 1, 7] = torch.nan
    replay(*bad)
    assert nan_scores(groups)
    replay(*rows(groups, 11))
    assert not nan_scores(groups) and torch.equal(found["out"], wanted[1]["out"])


def test_a_training_step_waits_at_its_log_point_only(groups):
    """With every check on: no call of forward, losses and backward synchronises; of a whole step, what reads the losses
    and the norm does."""
    # no E: Megatron's dispatcher of tokens asks the device how many go where
    settings = "pattern=AMRA depth=8 dsa.ranks=[0,1,3] dsa.share_every=2 mamba.headdim=32 mamba.d_state=32 dsa.index_head_dim=64"
    recipe = at_the_recipes_dims(small_recipe, *settings.split())
    one = engine(groups, recipe, **SPARSE)
    steps(one, recipe, range(2))
    there = {name: tensor.to(groups) for name, tensor in batch(recipe, 3).items()}
    one.ddp.zero_grad_buffer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one._cuda_pass(iter([there]), 1)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one.step(iter([there]), 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = {"/".join(Path(w.filename).parts[-3:]) for w in caught if "synchroniz" in str(w.message)}
    log_point = {"nam56r/megatron/engine.py", "kernels/dsa/status.py"}
    update = {"megatron/core/utils.py", *(name for name in waits if name.startswith("core/optimizer/"))}  # the norm
    assert log_point <= waits <= log_point | update
