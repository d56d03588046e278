"""The model through Megatron on a CPU: what is built, what it computes, and whose checkpoints it reads."""

import copy
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper, DSAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module

from nam56r.kernels.registry import DEVICES
from nam56r.megatron import specs
from nam56r.megatron.attention import DenseAttention
from nam56r.megatron.config import transformer_config
from nam56r.megatron.mamba import Mamba3Mixer
from nam56r.megatron.model import build_model
from nam56r.megatron.moe import Experts
from nam56r.megatron.parallel import destroy, initialize
from nam56r.megatron.sparse_attention import SparseCore
from nam56r.parameters import FAMILY, parameters
from nam56r.plan import make_plan
from tests.nam56r.layers import PlainCore

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def groups():
    initialize("cpu", seed=5)
    yield
    destroy()


def build(recipe, **kernels):
    plan = make_plan(recipe, DEVICES["cpu"], dtype=torch.float32, kernels=kernels)
    return build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32)


def batch(recipe, rows=2, seed=0):
    tokens = torch.randint(
        recipe.vocab_size, (rows, recipe.seq_length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1], torch.arange(recipe.seq_length).expand(rows, -1), tokens[:, 1:]


@pytest.fixture(scope="module")
def model():
    return build(small_recipe())


def test_trains(model):
    recipe = small_recipe()
    tokens, positions, labels = batch(recipe)
    model.zero_grad()
    loss = model(tokens, positions, None, labels=labels)
    assert loss.shape == labels.shape and loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(math.log(recipe.vocab_size), rel=0.1)
    loss.mean().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not dead


def test_stage_boundaries_drop_no_layers(model):
    """Megatron builds the first segment alone when there is one pipeline stage."""
    divided = build(small_recipe("pattern=AE|MRA"))
    assert divided.decoder.layer_type_list == model.decoder.layer_type_list == list("DEMR+")
    assert [n for n, _ in divided.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_counts_what_the_recipe_says(model):
    """Parameters of the built model, family by family."""
    for recipe, built in ((small_recipe(), model), (small_recipe("mamba.mimo_rank=1", "mtp.num_depths=2"), None)):
        built = built or build(recipe)
        counted = Counter()
        for name, parameter in built.named_parameters():
            where = re.match(r"decoder\.layers\.(\d+)\.(\w+)", name)
            if where is None:
                part = name.split(".")[0]
                family = {"embedding": "embedding", "output_layer": "head", "mtp": "mtp", "decoder": "norm"}[part]
            elif where[2] in ("input_layernorm", "pre_mlp_layernorm", "norm"):
                family = "norm"
            else:
                family = FAMILY[recipe.roles[int(where[1])]]
            counted[family] += parameter.numel()
        assert counted == {family: total for family, (total, _) in parameters(recipe).items()}


def test_every_layer_runs_its_slots_kernels():
    recipe = small_recipe()
    model = build(recipe, m2rnn="reference", rms_norm="reference")
    plan = model.config.plan
    for layer, slot in zip(model.decoder.layers, plan.slots, strict=True):
        ours = [m for m in layer.modules() if hasattr(m, "kernels")]
        assert ours and all(m.kernels == slot.kernels for m in ours)
    assert model.decoder.final_norm.kernels["rms_norm"] == "reference"
    assert model.output_layer.kernels == plan.head.kernels
    assert model.mtp.layers[0].enorm.kernels == plan.mtp[0].kernels


def test_no_token_sees_what_comes_after_it(model):
    recipe = small_recipe()
    tokens, positions, labels = batch(recipe, rows=1)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % recipe.vocab_size
    model.eval()
    with torch.no_grad():
        before, after = (model(t, positions, None) for t in (tokens, changed))
    model.train()
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_fused_loss_is_the_loss_of_the_logits(model):
    recipe = small_recipe()
    tokens, positions, labels = batch(recipe)
    model.eval()
    with torch.no_grad():
        logits = model(tokens, positions, None)
        fused = model(tokens, positions, None, labels=labels)
    model.train()
    torch.testing.assert_close(fused, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"))


def test_what_must_stay_fp32_does(model):
    half = build(small_recipe())
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    kept = {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"dt_bias", "B_bias", "C_bias", "D", "psi", "zeta", "phi", "A_log", "weight"}
    fp32_weights = [n for n, p in half.named_parameters() if p.dtype == torch.float32 and n.endswith(".weight")]
    assert all("mixer.weight" in n for n in fp32_weights)
    mixer = next(m for m in model.modules() if isinstance(m, Mamba3Mixer))
    twin = next(m for m in half.modules() if isinstance(m, Mamba3Mixer))
    assert torch.equal(mixer.dt_bias, twin.dt_bias)


def attention(module, spec, config, **submodules):
    spec = copy.copy(spec.submodules.self_attention)
    spec.module = module or spec.module
    spec.submodules = copy.copy(spec.submodules)
    for name, value in submodules.items():
        setattr(spec.submodules, name, value)
    return build_module(spec, config=config, layer_number=1)


def config_of(recipe, **overrides):
    plan = make_plan(recipe, DEVICES["cpu"], dtype=torch.float32)
    return transformer_config(recipe, plan, device=torch.device("cpu"), dtype=torch.float32, **overrides)


def outputs_and_gradients(module, x, *arguments):
    x = x.clone().requires_grad_()
    out = module(x, *arguments)
    out = out[0] if isinstance(out, tuple) else out
    names = [n for n, _ in module.named_parameters()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])
    return out, dict(zip(["x", *names], gradients))


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_dense_attention_is_megatrons_and_takes_its_weights():
    recipe = small_recipe()
    config = config_of(recipe)
    stock = attention(MLASelfAttention, specs.mla_layer, config, core_attention=PlainCore)
    ours = attention(DenseAttention, specs.mla_layer, config)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(recipe.seq_length, 2, recipe.hidden_size)
    same(outputs_and_gradients(stock, x, None), outputs_and_gradients(ours, x, None))


def test_sparse_attention_is_megatrons_and_takes_its_weights():
    # large scores, so that the loss is more than rounding; many heads, so that no two scores are the same zero
    recipe = small_recipe("init_std=0.3", "dsa.index_num_heads=24")
    config = config_of(recipe)
    stock_core = copy.copy(specs.dsa_layer.submodules.self_attention.submodules.core_attention)
    stock_core.module = DSAttention
    stock = attention(AbsorbedMLASelfAttention, specs.dsa_layer, config, core_attention=stock_core)
    ours = attention(None, specs.dsa_layer, config)
    assert isinstance(ours.core_attention, SparseCore)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(recipe.seq_length, 2, recipe.hidden_size)
    results, losses = [], []
    for module in (stock, ours):
        DSAIndexerLossLoggingHelper.tracker.clear()
        results.append(outputs_and_gradients(module, x, None))
        losses.append(DSAIndexerLossLoggingHelper.tracker["values"][0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] > 0
    same(*results)


def test_experts_are_megatrons_and_take_its_weights():
    recipe = small_recipe()
    from megatron.core.activations import squared_relu
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = config_of(recipe, activation_func=squared_relu, gated_linear_unit=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    stock = SequentialMLP(4, config, linears, pg_collection=groups)
    ours = Experts(4, config, pg_collection=groups)
    weights = {name: value for name, value in stock.state_dict().items() if value is not None}
    ours.load_state_dict(weights)
    stock.load_state_dict(ours.state_dict(), strict=False)
    counts, gates = torch.tensor([5, 0, 7, 3]), torch.rand(15)
    x = torch.randn(15, recipe.hidden_size)
    out, _ = ours(x, counts, gates)
    wanted, _ = stock(x, counts, gates)
    torch.testing.assert_close(out, wanted)
    with pytest.raises(RuntimeError, match="local_experts.3.linear_fc1"):
        ours.load_state_dict({name: value for name, value in weights.items() if ".3." not in name})


def test_packed_sequences_are_separate_ones(model):
    from megatron.core.packed_seq_params import PackedSeqParams

    recipe = small_recipe()
    x = torch.randn(recipe.seq_length, 1, recipe.hidden_size)
    ends = torch.tensor([0, 5, 5, 18, recipe.seq_length], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=14, max_seqlen_kv=14)
    model.eval()
    with torch.no_grad():
        for layer in model.decoder.layers:
            together, apart = [], []
            out = layer(hidden_states=x, attention_mask=None, packed_seq_params=packed)
            together = out[0] if isinstance(out, tuple) else out
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
                if start < end:
                    out = layer(hidden_states=x[start:end], attention_mask=None)
                    apart.append(out[0] if isinstance(out, tuple) else out)
            torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    model.train()


def test_layers_without_a_recipe_say_so():
    stock = config_of(small_recipe())
    stock.recipe = None
    with pytest.raises(ValueError, match="carries no recipe"):
        build_module(specs.m2rnn_layer.submodules.mixer, stock, 64, 1, pg_collection=SimpleNamespace(tp=None))
    assert specs.mla_layer.submodules.self_attention.params == {"attn_mask_type": AttnMaskType.causal}
