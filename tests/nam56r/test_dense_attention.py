"""Dense attention in its two forms: each other's results, Megatron's, recompute, packed rows, tensor parallelism."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from nam56r.kernels.registry import Problem
from nam56r.megatron import attention
from nam56r.megatron.norm import RMSNorm
from nam56r.megatron.parallel import destroy, initialize
from nam56r.problems import ATTENTION, Workload
from tests.nam56r.layers import Passes, PlainCore, Stub, drawn

sys.path.insert(0, str(Path(__file__).parent))
from dense_worker import CASES, ENDS, build, hidden, packed_row, recipe_of, run  # noqa: E402

WORKER = Path(__file__).parent / "dense_worker.py"
YARN = dict(
    rope_type="yarn", rotary_scaling_factor=8.0, original_max_position_embeddings=4, beta_fast=4.0, mscale=0.9,
    mscale_all_dim=0.7,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def groups():
    initialize("cpu", seed=5)
    yield
    destroy()


def same(found, wanted, rtol=1e-10):
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert exact.norm() > 0, name
        error = (found[name] - exact).norm() / exact.norm()
        assert error <= rtol, (name, error.item())


def twins(*forms, **options):
    """Layers with the same weights, none where a wrong formula would not show."""
    layers = [drawn(build(form, **options)) for form in forms]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers


sizes = st.integers(1, 5)


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, sizes, st.integers(1, 3), st.integers(1, 9), st.data())
def test_both_forms_give_the_same(heads, q_rank, latent, nope, half, value, batch, length, data):
    named = ("num_heads", heads), ("q_lora_rank", q_rank), ("kv_lora_rank", latent), ("qk_nope_head_dim", nope)
    named += ("qk_rope_head_dim", 2 * half), ("v_head_dim", value)
    # hidden_size is a multiple of the heads, as Megatron asks
    recipe = recipe_of(*(f"mla.{name}={size}" for name, size in named), "hidden_size=60")
    absorbed, expanded = twins("absorbed", "expanded", recipe=recipe)
    assert absorbed.absorbed and not expanded.absorbed
    packed = None
    if batch == 1:
        cuts = data.draw(st.lists(st.integers(0, length), max_size=3))
        packed = packed_row((0, *sorted(cuts), length))
    x = hidden(batch, length, width=60)
    found, wanted = run(absorbed, x, packed), run(expanded, x, packed)
    for name, exact in wanted.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("rotation", [{}, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("form", ATTENTION)
def test_equals_megatrons(form, rotation):
    """To about fp32's rounding: Megatron's angles are fp32."""
    stock = drawn(build(None, module=MLASelfAttention, submodules=dict(core_attention=PlainCore), **rotation))
    ours = build(form, **rotation)
    assert ours.softmax_scale == stock.softmax_scale and (ours.softmax_scale != 13**-0.5) == bool(rotation)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    for batch in (1, 3):
        same(run(ours, hidden(batch)), run(stock, hidden(batch)), rtol=2e-6)


def test_yarn_turns_otherwise():
    plain, scaled = twins("absorbed"), twins("absorbed", **YARN)
    assert (run(plain[0], hidden(1))["out"] - run(scaled[0], hidden(1))["out"]).abs().max() > 1e-3


@pytest.mark.parametrize("form", ATTENTION)
def test_packed_sequences_are_separate_ones(form):
    (layer,) = twins(form)
    x, d = hidden(1), hidden(1, seed=9)
    together = run(layer, x, packed_row(), d=d)
    parts = [run(layer, x[a:b], d=d[a:b]) for a, b in zip(ENDS, ENDS[1:]) if a < b]
    apart = {name: torch.cat([part[name] for part in parts]) for name in ("out", "x")}
    apart |= {name: sum(part[name] for part in parts) for name in parts[0].keys() - apart.keys()}
    same(together, apart)


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("how", ["full", "core_attn", "mla_up_proj", "core_attn mla_up_proj"])
def test_recompute_gives_the_same_bits(form, how, monkeypatch):
    chosen = {} if how == "full" else dict(recompute_granularity="selective", recompute_modules=how.split())
    plain, again = drawn(build(form)), build(form, **chosen)
    again.load_state_dict(plain.state_dict())

    def share(ours, remade):  # Megatron's is C++ that it compiles when it is first used
        ours.untyped_storage().resize_(remade.untyped_storage().nbytes()).copy_(remade.untyped_storage())

    monkeypatch.setattr(megatron_random, "_get_share_storage", lambda: share)
    if how == "full":
        layer = again.forward
        again.forward = lambda x, *_, packed_seq_params: checkpoint(
            lambda x: layer(x, packed_seq_params=packed_seq_params), False, x
        )
    runs = []
    for operator in ("mla_queries", ATTENTION[form]):

        def counted(*arguments, operator=operator, function=getattr(attention, operator), **options):
            runs.append(operator)
            return function(*arguments, **options)

        monkeypatch.setattr(attention, operator, counted)
    for batch, packed in ((2, None), (1, packed_row())):
        wanted = run(plain, hidden(batch), packed)
        runs.clear()
        found = run(again, hidden(batch), packed)
        # the reference's kv gets two gradients, as key and as value, which a checkpoint may add in another order
        same(found, wanted, rtol=1e-13 if "core_attn" in how else 0)
        assert torch.equal(found["linear_kv_up_proj.weight"], wanted["linear_kv_up_proj.weight"])
        assert runs.count("mla_queries") == 1 + (how != "core_attn")
        assert runs.count(ATTENTION[form]) == 1 + (how != "mla_up_proj")
    again.eval()
    runs.clear()
    with torch.no_grad():
        out, _ = again(hidden(2), None, packed_seq_params=None)
    assert torch.equal(out, run(plain, hidden(2))["out"])


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The weights of one process, and what two get from them, by case."""
    folder = tmp_path_factory.mktemp("dense")
    (whole,) = twins("absorbed")
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    torch.save(weights, folder / "weights.pt")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return weights, {case: torch.load(folder / f"{case}.pt") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_tensor_parallel_ranks_equal_one(split, case):
    form, _, packed = CASES[case]
    weights, cases = split
    layer = build(form)
    layer.load_state_dict(weights, strict=False)
    same(cases[case]["found"], run(layer, hidden(1 if packed else 2), packed_row() if packed else None))
    assert cases[case]["unlike"] == []


@pytest.mark.parametrize("form", ATTENTION)
def test_data_parallelism_gets_every_gradient_once(form):
    plain, layer = twins(form, form)
    wrapped = DistributedDataParallel(
        layer.config, DistributedDataParallelConfig(grad_reduce_in_fp32=False), layer, disable_bucketing=True
    )
    wrapped.zero_grad_buffer()
    total = {}
    for seed in (1, 2):  # two micro-batches
        x = hidden(2, seed=seed)
        out, _ = wrapped(x, None)
        out.backward(hidden(2, seed=9))
        for name, gradient in run(plain, x).items():
            total[name] = total.get(name, 0) + gradient
    same(
        {name: p.main_grad for name, p in layer.named_parameters()}, {n: total[n] for n, _ in plain.named_parameters()}
    )


@pytest.mark.parametrize("form", ATTENTION)
def test_weights_used_without_their_forward_are_waited_for(form):
    """Megatron's DDP waits in a forward pre-hook for weights that it gathers behind the forward."""
    (layer,) = twins(form)
    waited = []
    owners = {name: part for name, part in layer.named_modules() if [*part.parameters(recurse=False)]}
    for name, part in owners.items():
        part.register_forward_pre_hook(lambda *_, name=name: waited.append(name))
    layer(hidden(1), None)
    assert sorted(waited) == sorted(owners)


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("batch", [1, 3])
def test_poses_what_was_planned(form, batch, monkeypatch):
    recipe = recipe_of()
    layer = build(form, recipe)
    posed, make = {}, Problem.of.__func__

    def of(cls, operator, /, device=None, **arguments):
        posed[operator] = make(cls, operator, device, **arguments)
        return posed[operator]

    monkeypatch.setattr(Problem, "of", classmethod(of))
    layer(hidden(batch), None)
    asked = Workload(recipe, batch, 1, torch.float64).operators("mla", form=form)
    del asked["rms_norm"]  # of the layer around it
    assert {operator: dict(problem.arguments) for operator, problem in posed.items()} == asked


@pytest.mark.parametrize(("latent", "form"), [(6, "absorbed"), (7, "expanded")])
def test_without_a_plan_the_better_form_runs(latent, form):
    """Of 2 (2 latent + 6) and 2 (7 + 6 + 5) FLOPs a score."""
    recipe = recipe_of(f"mla.kv_lora_rank={latent}")
    layer, planned = twins(None, form, recipe=recipe)
    assert layer.kernels == {} and layer.absorbed == planned.absorbed == (form == "absorbed")
    same(run(layer, hidden(2)), run(planned, hidden(2)))


@pytest.mark.parametrize("batch", [1, 3])
def test_absorbed_copies_nothing_between_its_operators(batch, monkeypatch):
    """All passes over what has a row for each head, by name: products, which write where their result belongs."""
    length, heads, latent, rope, value = 96, 8, 10, 6, 5
    (layer,) = twins("absorbed", recipe=recipe_of(f"mla.num_heads={heads}"))
    calls = {"mla_queries": [], "latent_attention": []}

    def queries(q, cos, sin, *, up, **_):  # as the kernel does: the gradient is laid out like q
        return Stub.apply(calls["mla_queries"], (batch, length, heads, latent + rope), q.transpose(0, 1), up)

    def attend(q, kv, **_):
        return Stub.apply(calls["latent_attention"], (batch, length, heads, latent), q, kv)

    monkeypatch.setattr(attention, "mla_queries", queries)
    monkeypatch.setattr(attention, "latent_attention", attend)
    products = {"mm", "bmm", "_unsafe_view", "t"}
    smallest = length * batch * heads * value  # wider than the layer's input and output, and larger than a weight
    with Passes(smallest) as forward:
        out, _ = layer(hidden(batch, length).requires_grad_(), None)
    assert set(forward.ops) <= products
    _, up = calls["mla_queries"][0]
    assert up.untyped_storage().data_ptr() == layer.linear_kv_up_proj.weight.untyped_storage().data_ptr()
    with Passes(smallest) as backward:
        out.backward(hidden(batch, length, seed=9))
    assert set(backward.ops) <= products


def test_rotation_tables_are_shared_and_no_state():
    first, second = twins("absorbed", "absorbed")
    attention._tables.cache_clear()
    with torch.inference_mode():
        first(hidden(1), None)
    run(first, hidden(1))
    run(second, hidden(2))
    assert attention._tables.cache_info().misses == 1
    stock = build(None, module=MLASelfAttention, submodules=dict(core_attention=PlainCore))
    assert [(n, t.shape) for n, t in first.state_dict().items() if t is not None] == [
        (n, t.shape) for n, t in stock.state_dict().items() if t is not None
    ]


class Norm:
    """Builds torch's norms in Megatron's form."""

    def __init__(self, make):
        self.make = make

    def __call__(self, config, hidden_size, eps):
        return self.make(hidden_size, eps).to(config.params_dtype)


def test_norms_may_be_torchs_or_none():
    ours = drawn(build("absorbed"))
    torchs = Norm(lambda size, eps: torch.nn.RMSNorm(size, eps))
    layer = build("absorbed", submodules=dict(q_layernorm=torchs, kv_layernorm=torchs))
    layer.load_state_dict(ours.state_dict())
    same(run(layer, hidden(2)), run(ours, hidden(2)))
    none = dict(qk_layernorm=False, submodules=dict(q_layernorm=IdentityOp, kv_layernorm=IdentityOp))
    stock = drawn(build(None, module=MLASelfAttention, **{
        **none, "submodules": none["submodules"] | dict(core_attention=PlainCore)
    }))  # fmt: skip
    for form in ATTENTION:
        layer = build(form, **none)
        layer.load_state_dict(stock.state_dict())
        same(run(layer, hidden(2)), run(stock, hidden(2)), rtol=2e-6)


def test_what_it_does_not_do_is_refused_at_once():
    norms = dict(q_layernorm=Norm(torch.nn.LayerNorm), kv_layernorm=RMSNorm)
    with pytest.raises(ValueError) as error:
        build("absorbed", submodules=norms, rotary_percent=0.5)
    assert str(error.value).startswith(
        "DenseAttention: q_layernorm is LayerNorm, but must be an RMSNorm (nam56r's or torch's) or IdentityOp; "
        "rotary_percent is 0.5, but must be 1"
    )
    other = Norm(lambda size, eps: torch.nn.RMSNorm(size, 2 * eps, elementwise_affine=False))
    with pytest.raises(ValueError, match="kv_layernorm has no weight, but .* have eps .* and .*, but must have one"):
        build("absorbed", submodules=dict(q_layernorm=RMSNorm, kv_layernorm=other))
    with pytest.raises(ValueError, match="DenseAttention: context_parallel_size is 2, but must be 1"):
        build("absorbed", context_parallel_size=2)
    with pytest.raises(ValueError, match="DenseAttention: q_lora_rank is None, but must be a number"):
        norms = dict(q_layernorm=IdentityOp, kv_layernorm=IdentityOp)
        build("absorbed", q_lora_rank=None, submodules=norms, qk_layernorm=False)
    with pytest.raises(NotImplementedError, match="no inference path"):
        build("absorbed")(hidden(1), None, inference_context=object())
