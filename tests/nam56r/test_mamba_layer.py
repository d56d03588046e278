"""The M layers of both kinds: their modules' mathematics, whose weights they take, what they copy and recompute."""

import importlib.util
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import checkpoint as megatrons_checkpoint
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch.utils.checkpoint import checkpoint

from nam56r.kernels.mamba2.combined import gated_rms_norm
from nam56r.kernels.registry import Device, Problem, candidates
from nam56r.kernels.testing import error
from nam56r.megatron import mamba as layer
from nam56r.megatron.mamba import Mamba3Mixer, from_mamba_ssm, to_mamba_ssm
from nam56r.megatron.mamba2 import Mamba2Mixer
from nam56r.megatron.model import build_model
from nam56r.megatron.parallel import destroy, initialize
from nam56r.megatron.patches import apply_patches
from nam56r.megatron.specs import mamba_layer
from nam56r.plan import make_plan
from nam56r.problems import Workload
from tests.nam56r.layers import Passes, Stub, config_of, drawn, forget_losses

sys.path.insert(0, str(Path(__file__).parent))
import parallel_worker  # noqa: E402
from parallel_worker import small_recipe  # noqa: E402

SUBMODULES = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
KINDS = {"mamba3": Mamba3Mixer, "mamba2": partial(Mamba2Mixer, submodules=SUBMODULES)}


@pytest.fixture(autouse=True)
def device(request):
    apply_patches("model")
    yield initialize("cuda" if request.node.get_closest_marker("gpu") else "cpu", seed=5)
    destroy()
    forget_losses()


def recipe_of(kind, *settings):
    return small_recipe(f"mamba.kind={kind}", "mamba.headdim=8", "mamba.d_state=8", *settings)


def mixer_of(recipe, dtype=torch.float32, device="cpu", scale=0.3):
    """The mixer of a recipe, as the only layer of a model."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = recipe.with_overrides(["pattern=M", "depth=1", "dsa.ranks=[]", "mtp.num_depths=0"])
    config = config_of(alone, dtype, device)
    mixer = KINDS[recipe.mamba.kind](config, d_model=recipe.hidden_size, layer_number=1, pg_collection=groups)
    return drawn(mixer, scale=scale).to(device)


def double(mixer):
    """In float64 as a whole: what .double() leaves in fp32 too."""
    mixer = mixer.double()
    for name in mixer.FLOAT32:
        if getattr(mixer, name) is not None:
            getattr(mixer, name).data = getattr(mixer, name).data.double()
    return mixer


def mamba3_definition(weights, hidden, rate=None):
    """mamba_ssm.modules.mamba3.Mamba3 step by step in autograd; weights by its names, hidden [B, S, D].

    rate: A of its raw value; None takes the module's own since June 2026.
    """
    (heads, rank, N), inner = weights["B_bias"].shape, weights["out_proj.weight"].shape[1]
    P, angles, states = inner // heads, N // 4, weights["in_proj.weight"].shape[0] - 2 * inner - 3 * heads - N // 4
    sizes = [inner, inner, states // 2, states // 2, heads, heads, heads, angles]
    z, x, B, C, dt, A, trap, angle = (hidden @ weights["in_proj.weight"].T).split(sizes, dim=-1)
    batch, length = hidden.shape[:2]
    z, x = z.view(batch, length, heads, P), x.view(batch, length, heads, P)
    mimo = "mimo_x" in weights
    psi, zeta, phi = (weights[f"mimo_{i}"] if mimo else x.new_ones(heads, 1, P) for i in "xzo")

    def of_heads(states, weight, bias):
        """[B, S, (R G N)] -> [B, S, H, R, N], normed, with its bias."""
        states = states.view(batch, length, rank, -1, N)
        states = states * (states.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        return states.repeat_interleave(heads // states.shape[3], dim=3).transpose(2, 3) + bias

    def turn(t, theta):
        """t [B, H, R, N] by theta [B, H, N / 4], as complex numbers."""
        theta = F.pad(theta, (0, N // 4))[:, :, None]
        first, second = (t[..., : N // 2], t[..., N // 2 :]) if mimo else (t[..., 0::2], t[..., 1::2])
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(theta), theta)
        pair = (turned.real, turned.imag)
        return torch.cat(pair, -1) if mimo else torch.stack(pair, -1).flatten(-2)

    B = of_heads(B, weights["B_norm.weight"], weights["B_bias"])
    C = of_heads(C, weights["C_norm.weight"], weights["C_bias"])
    dt = F.softplus(dt + weights["dt_bias"])
    A = -(rate or (lambda a: a.clamp_min(0) + 1 / (1 - a.clamp_max(0))))(A)
    decay, share = (A.clamp(max=-1e-4) * dt).exp(), trap.sigmoid()
    theta = x.new_zeros(batch, heads, angles)
    state, last, ys = x.new_zeros(batch, heads, P, N), x.new_zeros(batch, heads, P, N), []
    for t in range(length):
        theta = theta + math.pi * angle[:, t, None].tanh() * dt[:, t, :, None]
        v = x[:, t, :, None] * psi  # [B, H, R, P]
        new = v.mT @ turn(B[:, t], theta)
        of_last, of_new = (1 - share[:, t]) * dt[:, t] * decay[:, t], share[:, t] * dt[:, t]
        state, last = (
            decay[:, t, :, None, None] * state + of_last[..., None, None] * last + of_new[..., None, None] * new,
            new,
        )
        y = turn(C[:, t], theta) @ state.mT + weights["D"][:, None, None] * v
        ys.append((y * F.silu(z[:, t, :, None] * zeta) * phi).sum(2))
    return torch.stack(ys, 1).flatten(2) @ weights["out_proj.weight"].T


def mamba2_definition(weights, hidden, groups):
    """Megatron's MambaMixer step by step in autograd; weights by its names, hidden [B, S, D]."""
    (heads,), inner = weights["D"].shape, weights["out_proj.weight"].shape[1]
    P, states = inner // heads, (weights["conv1d_weight"].shape[0] - inner) // 2
    z, mixed, dt = (hidden @ weights["in_proj.weight"].T).split([inner, inner + 2 * states, heads], dim=-1)
    batch, length = hidden.shape[:2]
    mixed = F.conv1d(
        mixed.mT, weights["conv1d_weight"], weights["conv1d_bias"], padding=3, groups=inner + 2 * states
    ).mT
    x, B, C = F.silu(mixed[:, :length]).split([inner, states, states], dim=-1)
    x = x.view(batch, length, heads, P)
    B, C = (t.view(batch, length, groups, -1).repeat_interleave(heads // groups, dim=2) for t in (B, C))
    dt = F.softplus(dt + weights["dt_bias"])
    decay = (-weights["A_log"].exp() * dt).exp()
    state, ys = x.new_zeros(batch, heads, P, B.shape[-1]), []
    for t in range(length):
        new = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = decay[:, t, :, None, None] * state + new
        ys.append((state @ C[:, t, ..., None]).squeeze(-1) + weights["D"][:, None] * x[:, t])
    y = torch.stack(ys, 1).flatten(2) * F.silu(z)
    y = y.unflatten(-1, (groups, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2) * weights["norm.weight"]
    return y @ weights["out_proj.weight"].T


def agrees(mixer, definition, theirs, back, length, batch=2):
    """Output and all gradients of the mixer [S, B, D] and of the definition [B, S, D], in float64.

    theirs: the mixer's weights by the definition's names; back: from the mixer's names to the definition's.
    """
    weights = {name: value.detach().clone().requires_grad_() for name, value in theirs.items()}
    hidden = torch.randn(length, batch, mixer.config.hidden_size, dtype=torch.float64, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()
    out, wanted = mixer(hidden)[0], definition(weights, twin.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    dout = torch.randn_like(out)
    out.backward(dout)
    wanted.backward(dout)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-8, atol=1e-10)
    gradients = back({name: parameter.grad for name, parameter in mixer.named_parameters()})
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("rank, length", [(1, 7), (2, 1), (4, 9), (4, 40)])  # 40 is more than a chunk of the reference
def test_mamba3_is_mamba_ssms_module(rank, groups, length):
    mixer = double(mixer_of(recipe_of("mamba3", f"mamba.mimo_rank={rank}", f"mamba.ngroups={groups}")))
    theirs = to_mamba_ssm(mixer.state_dict())
    assert all(torch.equal(value, mixer.state_dict()[name]) for name, value in from_mamba_ssm(theirs).items())
    agrees(mixer, mamba3_definition, theirs, to_mamba_ssm, length)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_mamba2_is_megatrons_mixer(groups, length):
    mixer = double(mixer_of(recipe_of("mamba2", f"mamba.ngroups={groups}")))
    theirs = {name: value for name, value in mixer.state_dict().items() if value is not None}
    agrees(mixer, partial(mamba2_definition, groups=groups), theirs, dict, length)


def test_mamba2_is_megatrons_own_path_without_the_fused_step():
    """Megatron's code around the scan, with the gate in the norm."""
    mixer = mixer_of(recipe_of("mamba2", "mamba.ngroups=4"))
    hidden = torch.randn(19, 2, 64)
    assert mixer.use_mem_eff_path
    ours = mixer(hidden)[0]
    mixer.use_mem_eff_path = False
    assert error(ours, mixer(hidden)[0]) < 1e-6  # in fp32


@pytest.mark.parametrize("gated", [True, False])
def test_gated_norm_has_the_gradients_of_its_formula(gated):
    x, z, weight = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 12), (2, 3, 12), 12)
    )
    x, z = x.transpose(0, 1), z.transpose(0, 1) if gated else None
    norm = partial(gated_rms_norm, group_size=4, eps=1e-3)
    assert torch.autograd.gradcheck(norm, (x, weight, z))
    wanted = (x * F.silu(z) if gated else x).unflatten(-1, (3, 4))
    wanted = wanted / (wanted.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x, weight, z), wanted.flatten(-2) * weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"norm.weight": s["D"]}, "norm.weight has no counterpart"),
        (lambda s: {k: v for k, v in s.items() if k not in ("D", "mimo_o")}, "mimo_o is missing; D is missing"),
        (lambda s: {k: v for k, v in s.items() if "mimo" not in k}, "mimo_x is missing; mimo_z is missing; mimo_o is"),
        (lambda s: s | {"in_proj.weight": s["in_proj.weight"][2:]}, "rope_fraction must be 0.5"),
        (
            lambda s: s | {"B_bias": s["B_bias"][:, :1], "in_proj.weight": s["in_proj.weight"][32:]},
            "mimo_x of rank 1: MIMO turns other pairs than SISO",
        ),
    ],
)
def test_refuses_another_modules_weights(change, message):
    state = to_mamba_ssm(mixer_of(recipe_of("mamba3", "mamba.ngroups=2", "mamba.mimo_rank=2")).state_dict())
    with pytest.raises(ValueError, match=message):
        from_mamba_ssm(change(state))


def test_initial_values_are_mamba_ssms():
    recipe = recipe_of("mamba3", "mamba.mimo_rank=4")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mixer = Mamba3Mixer(config_of(recipe), recipe.hidden_size, 3, groups)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * (1 - 1e-4) and dt.max() <= 0.1 * (1 + 1e-4) and dt.unique().numel() == dt.numel()
    for name, value in dict(B_bias=1, C_bias=1, D=1, psi=1 / 4, zeta=1, phi=1 / 4, B_norm=1, C_norm=1).items():
        assert (getattr(mixer, name) == value).all(), name


FLOAT32 = {"mamba3": {"dt_bias", "B_bias", "C_bias", "D", "psi", "zeta", "phi"}, "mamba2": {"A_log", "dt_bias", "D"}}


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_parameters_stay_so_in_float16_module_and_checkpoint(kind, tmp_path):
    recipe = recipe_of(kind)
    mixer = mixer_of(recipe, torch.bfloat16)
    mixer.config.bf16 = True
    wrapped = Float16Module(mixer.config, mixer)
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == FLOAT32[kind]
    drawn(mixer, seed=4)  # digits that bf16 doesn't have
    sharded = wrapped.sharded_state_dict()
    assert {name for name, t in sharded.items() if t.data is not None and t.data.dtype == torch.float32} == FLOAT32[
        kind
    ]
    dist_checkpointing.save(sharded, str(tmp_path))
    other = Float16Module(mixer.config, mixer_of(recipe, torch.bfloat16))
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path)))
    for (name, loaded), saved in zip(other.named_parameters(), wrapped.parameters(), strict=True):
        assert loaded.dtype == saved.dtype and torch.equal(loaded, saved), name


def test_mamba2s_checkpoint_is_megatrons_own():
    """Names and shapes of Megatron's mixer; in checkpoints those of its own stack, with the norm in the projection."""
    recipe = recipe_of("mamba2", "mamba.ngroups=4")
    built = build_module(
        mamba_layer, config_of(recipe), layer_number=3, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    inner, states, heads = 128, 4 * 8, 16
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == {
        "norm.weight": (64,),
        "mixer.in_proj.weight": (2 * inner + 2 * states + heads, 64),
        "mixer.conv1d_weight": (inner + 2 * states, 1, 4),
        "mixer.conv1d_bias": (inner + 2 * states,),
        "mixer.dt_bias": (heads,),
        "mixer.A_log": (heads,),
        "mixer.D": (heads,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (64, inner),
    }
    sharded = built.sharded_state_dict("layer.")
    keys = {name.removeprefix("layer."): t.key.removeprefix("layer.") for name, t in sharded.items()}
    assert {name: key for name, key in keys.items() if name != key} == {
        "norm.weight": "mixer.in_proj.layer_norm_weight",
        "mixer.conv1d_weight": "mixer.conv1d.weight",
        "mixer.conv1d_bias": "mixer.conv1d.bias",
    }


def test_the_slot_is_of_the_recipes_kind():
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for kind, mixer in {"mamba3": Mamba3Mixer, "mamba2": Mamba2Mixer}.items():
        built = build_module(mamba_layer, config_of(recipe_of(kind)), layer_number=3, pg_collection=groups)
        assert type(built.mixer) is mixer


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_gradients_have_the_same_bits(kind):
    recomputes_alike(mixer_of(recipe_of(kind), torch.bfloat16))


def recomputes_alike(mixer):
    hidden = torch.randn(50, 2, 64, dtype=torch.bfloat16, device=mixer.D.device)
    weight = torch.randn_like(hidden)

    def gradients(run):
        x = hidden.clone().requires_grad_()
        mixer.zero_grad()
        run(lambda x: mixer(x)[0], x).backward(weight)
        return [x.grad, *(parameter.grad for parameter in mixer.parameters())]

    plain = gradients(lambda function, x: function(x))
    # the first of them refuses a saved tensor that is read twice
    for run in (
        partial(checkpoint, use_reentrant=False),
        partial(checkpoint, use_reentrant=True),
        lambda function, x: megatrons_checkpoint(function, False, x),
    ):
        assert all(map(torch.equal, gradients(run), plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_recomputed_as_a_whole_has_the_same_gradients(kind):
    recipe = recipe_of(kind)
    plan = make_plan(recipe, Device.of("cpu"), dtype=torch.float32)
    tokens = torch.randint(recipe.vocab_size, (2, recipe.seq_length))
    found = []
    for recompute in ({}, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)):
        torch.manual_seed(7)
        model = build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32, **recompute)
        model(tokens, torch.arange(recipe.seq_length).expand(2, -1), None, labels=tokens).mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, again = found
    assert all(gradient.any() and torch.equal(again[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_separate_ones(kind):
    from megatron.core.packed_seq_params import PackedSeqParams

    mixer = mixer_of(recipe_of(kind))
    ends = torch.tensor([0, 5, 5, 6, 32], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    hidden = torch.randn(32, 1, 64)
    apart = [mixer(part)[0] for part in hidden.split([5, 1, 26])]
    torch.testing.assert_close(mixer(hidden, packed_seq_params=packed)[0], torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [["mamba3"], ["mamba3", "mamba.mimo_rank=1"], ["mamba2"]], ids=str)
def test_asks_for_the_kernels_that_were_planned(settings, dtype, monkeypatch):
    """The problems that a layer poses are the plan's, by name of operator, and it asks for the plan's kernels."""
    recipe = recipe_of(*settings)
    mixer = mixer_of(recipe, dtype)
    mixer.kernels = planned = mixer.config.plan.slots[0].kernels
    posed, named, make = {}, {}, Problem.of.__func__

    def of(cls, operator, /, device=None, **arguments):
        posed[operator] = make(cls, operator, device, **arguments)
        return posed[operator]

    def select(problem, name=None):
        named[problem.operator] = name
        return next(kernel for kernel in candidates(problem.operator) if kernel.name == name)

    monkeypatch.setattr(Problem, "of", classmethod(of))
    for family in ("mamba3", "mamba2", "conv1d", "norm"):
        monkeypatch.setattr(f"nam56r.kernels.{family}.select", select)
    mixer(torch.randn(recipe.seq_length, 2, 64, dtype=dtype))
    asked = Workload(recipe, 2, 1, dtype).operators(recipe.mamba.kind)
    del asked["rms_norm"]  # planned at the hidden size, which stands for all norms
    for operator, arguments in asked.items():
        assert dict(posed[operator].arguments) == arguments, operator
        assert named[operator] == planned[operator]


def test_mamba3_copies_nothing_between_its_operators(monkeypatch):
    """What the operators are given, and all passes over a tensor of the layer's width, by name."""
    recipe = recipe_of("mamba3", "mamba.ngroups=2", "mamba.mimo_rank=2")
    length, batch, heads, P = 96, 3, 16, 8
    mixer = mixer_of(recipe, torch.bfloat16)
    scan, norm = [], []

    def stub_scan(x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, *, mimo, **_):
        # as the kernel does: results are laid out like x and z
        tensors = x.transpose(0, 1), z.transpose(0, 1), B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, *mimo
        return Stub.apply(scan, (length, batch, heads, P), *tensors).transpose(0, 1), None

    monkeypatch.setattr(layer, "mamba3_scan", stub_scan)
    monkeypatch.setattr(layer, "rms_norm", lambda x, weight, eps, **_: Stub.apply(norm, x.shape, x, weight))
    hidden = torch.randn(length, batch, 64, dtype=torch.bfloat16, requires_grad=True)
    # wider than dt, A and trap, narrower than B and C
    with Passes(length * batch * 2 * heads) as forward:
        out, _ = mixer(hidden)
    products = {"mm", "linear", "_unsafe_view", "matmul"}
    assert [name for name in forward.ops if name not in products] == []

    x, z, B, C, dt, log_decay, trap, angles = scan[0][:8]
    width = sum(mixer.sections.values())
    assert x.stride() == z.stride() == (batch * width, width, P, 1)
    assert angles.shape == (batch, length, 1, 2) and angles.stride()[:2] == (width, batch * width)
    storages = {t.untyped_storage().data_ptr() for t in (x, z, angles, norm[0][0], norm[1][0])}
    assert len(storages) == 1
    assert B.shape == C.shape == (batch, length, 2, 2, 8) and B.stride(4) == 1
    for t in (dt, log_decay, trap):
        assert (
            t.dtype == torch.float32 and t.shape == (batch, heads, length) and t.stride() == (heads, 1, batch * heads)
        )

    with Passes(length * batch * 2 * heads) as backward:
        out.backward(torch.randn_like(out))
    passes = [name for name in backward.ops if name not in products | {"randn_like", "t"}]
    assert sorted(passes) == ["cat"]  # all sections become one gradient of the product
    assert scan[1][0].is_contiguous()


def test_mamba2_copies_nothing_between_its_operators(monkeypatch):
    from nam56r.megatron import mamba2

    recipe = recipe_of("mamba2", "mamba.ngroups=2")
    length, batch, heads, P = 96, 3, 16, 8
    mixer = mixer_of(recipe, torch.bfloat16)
    conv, scan = [], []

    def stub_conv(x, weight, bias, **_):
        return Stub.apply(conv, x.shape, x, weight, bias), None

    def stub_scan(x, dt, A, B, C, D, z, dt_bias, **_):
        tensors = z.transpose(0, 1), x, dt, A, B, C, D, dt_bias
        return Stub.apply(scan, (length, batch, heads, P), *tensors).transpose(0, 1), None

    monkeypatch.setattr(mamba2, "causal_conv1d", stub_conv)
    monkeypatch.setattr(mamba2, "mamba2_scan", stub_scan)
    monkeypatch.setattr(mamba2, "gated_rms_norm", lambda y, weight, z, **_: Stub.apply([], y.shape, y, weight))
    hidden = torch.randn(length, batch, 64, dtype=torch.bfloat16, requires_grad=True)
    with Passes(length * batch * 2 * heads) as forward:
        out, _ = mixer(hidden)
    products = {"mm", "linear", "_unsafe_view", "matmul"}
    assert [name for name in forward.ops if name not in products] == []
    (z, x, dt, *_), ((mixed, _, _), *_) = scan[0], conv
    width, inner, channels = 2 * 128 + 2 * 16 + heads, 128, 128 + 2 * 16
    assert z.stride() == (batch * width, width, P, 1) and dt.stride() == (width, batch * width, 1)
    assert mixed.stride() == (width, batch * width, 1) and mixed.storage_offset() == inner
    assert x.stride() == (length * channels, channels, P, 1)
    with Passes(length * batch * 2 * heads) as backward:
        out.backward(torch.randn_like(out))
    passes = [name for name in backward.ops if name not in products | {"randn_like", "t"}]
    assert sorted(passes) == ["cat", "cat"]  # of the convolution's output, and of the product


def test_mamba2_on_two_tensor_parallel_ranks_equals_one(tmp_path, monkeypatch):
    """Loss and gradients, from one process's checkpoint; the gradients come back as a checkpoint of two."""
    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler, DSAIndexerLossAutoScaler):  # the worker sets them
        monkeypatch.setattr(scaler, "main_loss_backward_scale", scaler.main_loss_backward_scale)
    settings = "mamba.kind=mamba2 mamba.ngroups=4 pattern=M depth=1 dsa.ranks=[] mtp.num_depths=0".split()
    destroy()
    parallel_worker.main(tmp_path, "one", 1, 1, *settings)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, parallel_worker.__file__, str(tmp_path), "tp2", "2", "1", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "tp2"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["unlike"] == {"drawn": [], "loaded": [], "gradients": []}
    initialize("cpu", seed=5)
    recipe = small_recipe(*settings)
    plan = make_plan(recipe, Device.of("cpu"), dtype=torch.float32)
    model = build_model(recipe, plan, device=torch.device("cpu"), dtype=torch.float32)
    exact, split = (
        dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path / name)) for name in ("one", "tp2")
    )
    tensors = {name: value for name, value in exact.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == dict(model.named_parameters()).keys()
    differing = [name for name, value in tensors.items() if not error(split[name], value) <= 1e-4]
    assert not differing and all(value.any() for value in tensors.values())


def peer_module():
    """mamba_ssm.modules.mamba3, past its package's import, which wants a CUDA module."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed")
    from bench.peers.mamba_ssm import _module

    return _module("modules.mamba3")


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_equals_mamba_ssms_module_on_a_gpu(rank, monkeypatch):
    """With the same weights, in bf16: both are as near to the definition in float64, outputs and gradients."""
    peer = peer_module()
    if rank > 1 and peer.mamba3_mimo_combined is None:
        pytest.skip("mamba-ssm's MIMO needs TileLang")
    sizes = dict(d_state=128, headdim=64, ngroups=2, expand=2)
    theirs = peer.Mamba3(
        256,
        **sizes,
        is_mimo=rank > 1,
        mimo_rank=rank,
        chunk_size=64 // rank,
        layer_idx=0,
        device="cuda",
        dtype=torch.bfloat16,
    )
    rate = None
    if not hasattr(peer, "heavy_tail_activation"):  # up to 2.3.2 A is −softplus
        rate = F.softplus
        monkeypatch.setattr(layer, "log_decay_rate", lambda raw: -F.softplus(raw).clamp(min=1e-4))
    settings = [f"mamba.{name}={value}" for name, value in sizes.items()]
    recipe = small_recipe("hidden_size=256", f"mamba.mimo_rank={rank}", *settings)
    # weights at which 16 bits of a projection don't move the sum of angles by much
    ours = mixer_of(recipe, torch.bfloat16, "cuda", scale=0.03)
    theirs.load_state_dict(to_mamba_ssm(ours.state_dict()))
    weights = {name: value.double().cpu().requires_grad_() for name, value in theirs.state_dict().items()}
    hidden = torch.randn(2, 128, 256).bfloat16()
    dout = torch.randn(2, 128, 256).bfloat16()

    exact_in = hidden.double().requires_grad_()
    exact = mamba3_definition(weights, exact_in, rate)
    exact.backward(dout.double())
    wanted = {"out": exact, "hidden": exact_in.grad} | {name: value.grad for name, value in weights.items()}

    their_in = hidden.cuda().requires_grad_()
    out = theirs(their_in)
    out.backward(dout.cuda())
    peers = {"out": out, "hidden": their_in.grad} | {name: p.grad for name, p in theirs.named_parameters()}

    our_in = hidden.cuda().transpose(0, 1).contiguous().requires_grad_()
    out = ours(our_in)[0]
    out.backward(dout.cuda().transpose(0, 1))
    mine = {"out": out.transpose(0, 1), "hidden": our_in.grad.transpose(0, 1)}
    mine |= to_mamba_ssm({name: parameter.grad for name, parameter in ours.named_parameters()})

    assert wanted.keys() == peers.keys() == mine.keys()
    errors = {name: (error(mine[name].cpu(), value), error(peers[name].cpu(), value)) for name, value in wanted.items()}
    floor = torch.finfo(torch.bfloat16).eps
    assert all(theirs < 0.1 and ours <= 2 * max(theirs, floor) for ours, theirs in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_gradients_have_the_same_bits_on_a_gpu(kind):
    settings = "mamba.headdim=64 mamba.d_state=64 mamba.ngroups=2 mamba.mimo_rank=4".split()
    recomputes_alike(mixer_of(small_recipe(f"mamba.kind={kind}", *settings), torch.bfloat16, "cuda"))
