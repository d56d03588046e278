"""The R layer: its mathematics from the paper, what it copies and keeps, its parameters in checkpoints."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from nam56r.kernels.m2rnn.gate import skip_and_gate
from nam56r.megatron import m2rnn as layer
from nam56r.megatron.linear import PRODUCT_COLUMNS, SECTION_COLUMNS, ReplicatedLinear, SectionedLinear
from nam56r.megatron.parallel import destroy, initialize
from nam56r.parameters import m2rnn as shapes
from tests.nam56r.layers import Passes, Stub, config_of, drawn

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import small_recipe  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def groups():
    initialize("cpu", seed=5)
    yield
    destroy()


def mixer_of(recipe, dtype=torch.float32):
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return drawn(layer.M2RNNMixer(config_of(recipe, dtype), recipe.hidden_size, 1, groups))


def definition(recipe, weights, hidden):
    """The layer as the paper has it, step by step in autograd; weights by the names of the module. hidden [S, B, D]."""
    r, x = recipe.m2rnn, hidden.transpose(0, 1)
    K, N, V, length = r.k_head_dim, r.num_heads, r.v_head_dim, x.shape[1]
    projected = x @ weights["in_proj.weight"].T
    mixed, f, g = projected[..., : 2 * K + N * V], projected[..., 2 * K + N * V : -N * V], projected[..., -N * V :]
    earlier = F.pad(mixed, (0, 0, r.conv_width - 1, 0))
    taps = (earlier[:, w : w + length] * weights["conv_weight"][:, w] for w in range(r.conv_width))
    mixed = F.silu(sum(taps))
    q, k, v = mixed[..., :K], mixed[..., K : 2 * K], mixed[..., 2 * K :].unflatten(-1, (N, V))
    forget = torch.exp(-weights["A_log"].exp() * F.softplus(f + weights["dt_bias"]))
    state, ys = x.new_zeros(x.shape[0], N, K, V), []
    for t in range(length):
        new = torch.tanh(state @ weights["weight"] + k[:, t, None, :, None] * v[:, t, :, None, :])
        keep = forget[:, t, :, None, None]
        state = keep * state + (1 - keep) * new
        ys.append((q[:, t, None, :, None] * state).sum(-2))
    y = torch.stack(ys, 1) + weights["D"][:, None] * v
    y = y.flatten(2) * F.silu(g)
    y = y * (y.square().mean(-1, keepdim=True) + recipe.norm_eps).rsqrt() * weights["norm_weight"]
    return (y @ weights["out_proj.weight"].T).transpose(0, 1)


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 5),
    k=st.integers(1, 9),
    v=st.integers(1, 9),
    width=st.integers(2, 4),
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
)
@example(heads=3, k=16, v=16, width=4, length=70, batch=2)  # more than one chunk of the reference
def test_is_its_definition(heads, k, v, width, length, batch):
    sizes = {"num_heads": heads, "k_head_dim": k, "v_head_dim": v, "conv_width": width}
    recipe = small_recipe(*(f"m2rnn.{name}={size}" for name, size in sizes.items()))
    mixer = mixer_of(recipe).double()
    for name in mixer.FLOAT32:  # which .double() leaves: here the definition's digits are wanted
        getattr(mixer, name).data = getattr(mixer, name).data.double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    hidden = torch.randn(length, batch, recipe.hidden_size, dtype=torch.float64, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()
    out, wanted = mixer(hidden)[0], definition(recipe, weights, twin)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    dout = torch.randn_like(out)
    out.backward(dout)
    wanted.backward(dout)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-8, atol=1e-10)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def test_bf16_is_near_the_definition():
    """In bf16 the layer loses no more than twice what the definition in bf16, fp32 parameters included, does."""
    recipe = small_recipe()
    mixer = mixer_of(recipe, torch.bfloat16)
    hidden = torch.randn(40, 2, recipe.hidden_size).bfloat16()
    weights = dict(mixer.named_parameters())
    with torch.no_grad():
        exact = definition(recipe, {name: p.double() for name, p in weights.items()}, hidden.double())
        rounded = definition(recipe, {name: p.bfloat16() for name, p in weights.items()}, hidden)
        out = mixer(hidden)[0]
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() <= 2 * (rounded - exact).norm()


@settings(deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 4))
@example([944, 51, 816], 4, 2)
@example([832, 44, 704], 4, 1)
@example([64, 8, 56], 3, 2)  # nothing to add
def test_sections_are_the_product_and_aligned(sections, inputs, rows):
    config = config_of(small_recipe())
    linear = SectionedLinear(inputs, sections, config=config, init_method=torch.nn.init.normal_)
    assert linear.weight.shape == (sum(sections), inputs)
    plain = ReplicatedLinear(inputs, sum(sections), config=config, init_method=torch.nn.init.normal_)
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(rows, 2, inputs, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    parts = linear(x)
    wanted = plain(twin)[0].split(sections, dim=-1)
    douts = [torch.randn_like(part) for part in parts]
    for part, want in zip(parts, wanted, strict=True):
        torch.testing.assert_close(part, want)
        assert part.storage_offset() % SECTION_COLUMNS == 0
        assert part.stride() == (2 * part.stride(1), part.stride(1), 1) and part.stride(1) % PRODUCT_COLUMNS == 0
        assert part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
    assert sum(sections) <= parts[0].stride(1) < sum(sections) + len(sections) * SECTION_COLUMNS + PRODUCT_COLUMNS
    torch.autograd.backward(parts, douts)
    torch.autograd.backward(wanted, douts)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad)


def test_a_section_without_a_gradient_has_none():
    linear = SectionedLinear(3, [5, 2], config=config_of(small_recipe()), init_method=torch.nn.init.normal_)
    linear(torch.randn(4, 3))[1].sum().backward()
    assert not linear.weight.grad[:5].any() and linear.weight.grad[5:].all()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_skip_and_gate_has_the_gradients_of_its_formula(length, batch, heads, headdim):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    inputs = draw(length, batch, heads, headdim), draw(length, batch, heads, headdim), draw(heads)
    assert torch.autograd.gradcheck(skip_and_gate, (*inputs, draw(length, batch, heads * headdim)))


def test_copies_nothing_between_its_operators(monkeypatch):
    """What the operators are given, and all passes over a tensor of the layer's width, by name."""
    recipe = small_recipe("m2rnn.num_heads=6")
    r, length, batch = recipe.m2rnn, 96, 3  # more tokens than the weights have rows
    mixer = mixer_of(recipe, torch.bfloat16)
    conv, scan, norm = [], [], []

    def stub_conv(x, weight, **_):
        return Stub.apply(conv, x.shape, x, weight), None

    def stub_scan(q, k, v, weight, forget, **_):
        return Stub.apply(scan, v.shape, q, k, v, weight, forget), None

    def stub_norm(x, weight, eps, **_):
        return Stub.apply(norm, x.shape, x, weight)

    monkeypatch.setattr(layer, "causal_conv1d", stub_conv)
    monkeypatch.setattr(layer, "m2rnn", stub_scan)
    monkeypatch.setattr(layer, "rms_norm", stub_norm)
    hidden = torch.randn(length, batch, recipe.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    width = r.num_heads * r.v_head_dim
    with Passes(length * batch * width) as forward:
        out, _ = mixer(hidden)
    products = {"mm", "linear", "_unsafe_view"}
    passes = [name for name in forward.ops if name not in products]
    assert sorted(passes) == sorted(["addcmul", "_to_copy", "silu", "mul"])

    ((x, _),), ((q, k, v, _, forget),), ((gated, _),) = conv, scan, norm
    assert x.stride(2) == 1 and x.stride(1) == batch * x.stride(0) and x.stride(0) % PRODUCT_COLUMNS == 0
    mixed = 2 * r.k_head_dim + width
    assert {t.stride(1) for t in (q, k, v)} == {mixed} and q.stride(0) == length * mixed
    storage = q.untyped_storage().data_ptr()
    assert storage == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert (q.storage_offset(), k.storage_offset(), v.storage_offset()) == (0, r.k_head_dim, 2 * r.k_head_dim)
    assert forget.dtype == torch.float32 and forget.stride(2) == 1
    assert gated.is_contiguous() and gated.dtype == torch.bfloat16

    with Passes(length * batch * width) as backward:
        out.backward(torch.randn_like(out))
    passes = [name for name in backward.ops if name not in products | {"randn_like"}]
    gate = ["addcmul", "_to_copy", "mul_", "silu_backward", "silu", "mul_", "copy_", "mul", "mul_", "sum"]
    # v's two gradients are added; q, k, v become one gradient of the convolution, and all sections one of the product
    assert sorted(passes) == sorted([*gate, "add", "cat", "cat"])
    (dy,) = scan[1]
    assert dy.is_contiguous()


def test_has_the_recipes_parameters_and_no_padding():
    recipe = small_recipe("m2rnn.num_heads=5", "m2rnn.v_head_dim=7")
    mixer = mixer_of(recipe)
    assert sorted(tuple(p.shape) for p in mixer.parameters()) == sorted(shapes(recipe).values())
    sharded = mixer.sharded_state_dict("mixer.")
    assert {name: tensor.global_shape for name, tensor in sharded.items()} == {
        f"mixer.{name}": tuple(p.shape) for name, p in mixer.named_parameters()
    }


def test_fp32_parameters_stay_so_in_float16_module_and_checkpoint(tmp_path):
    recipe = small_recipe()
    config = config_of(recipe, torch.bfloat16)
    config.bf16 = True
    mixer = mixer_of(recipe)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    wrapped = Float16Module(config, mixer)
    fp32 = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias", "D", "weight"}
    for name in fp32:  # all digits, and more than bf16 has
        value = getattr(mixer, name)
        assert torch.equal(value, before[name]) and not torch.equal(value.bfloat16().float(), value)
    sharded = wrapped.sharded_state_dict()
    assert {name for name, tensor in sharded.items() if tensor.dtype == torch.float32} == fp32
    dist_checkpointing.save(sharded, str(tmp_path))
    other = Float16Module(config, mixer_of(recipe))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path)))
    for (name, loaded), saved in zip(other.named_parameters(), wrapped.parameters(), strict=True):
        assert loaded.dtype == saved.dtype and torch.equal(loaded, saved), name
