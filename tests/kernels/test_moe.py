"""Routed experts: every kernel against the definition, the definition against all experts on all tokens."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.moe import library, moe_experts, reference
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec, select
from nam56r.kernels.testing import agree, error, kernels_here, outputs_and_gradients, replays, same_bits

KERNELS = kernels_here("moe_experts")
ACTIVATIONS = ["relu2", "swiglu"]
SHAPES = [(37, 3, 5, 24, 16), (30, 1, 1, 16, 8), (0, 2, 3, 8, 8), (64, 4, 4, 8, 40)]  # T, K, E, D, F


def inputs(T, K, E, D, F, activation="relu2", dtype=torch.float64, *, unused=0.2, empty=(), device="cpu", seed=0):
    """unused: the share of slots without an expert; empty: experts that no token chooses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids = torch.rand(T, E, generator=generator).argsort(1)[:, :K].int()
    ids[torch.rand(T, K, generator=generator) < unused] = -1
    for expert in empty:
        ids[ids == expert] = -1
    made = {
        "x": draw(T, D).to(dtype),
        "gates": torch.rand(T, K, generator=generator).to(torch.promote_types(dtype, torch.float32)),
        "w_up": (draw(E, 2 * F if activation == "swiglu" else F, D) * D**-0.5).to(dtype),
        "w_down": (draw(E, D, F) * F**-0.5).to(dtype),
    }
    return {n: t.to(device).requires_grad_() for n, t in made.items()} | {"expert_ids": ids.to(device)}


def judge(kernel, made, activation="relu2", factor=2.0):
    dtype = made["x"].dtype
    definition = partial(reference.moe_experts, activation=activation)
    same = None if dtype == torch.float32 else partial(definition, compute_dtype=dtype)
    run = partial(moe_experts, activation=activation, kernel=kernel)
    agree(run, definition, made, same_dtype=same, factor=factor)


def poison(device):
    """Fill what the allocator hands out next with NaN, as rows that nobody writes may be."""
    torch.full((2**26,), torch.nan, device=device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_definition(activation):
    made = inputs(9, 3, 5, 4, 6, activation)
    h = torch.einsum("efd,td->tef", made["w_up"], made["x"])
    act = h.clamp_min(0) ** 2 if activation == "relu2" else F.silu(h[..., :6]) * h[..., 6:]
    y = torch.einsum("edf,tef->ted", made["w_down"], act)
    chosen = F.one_hot(made["expert_ids"].long() + 1, 6)[..., 1:].double()
    expected = torch.einsum("tke,tk,ted->td", chosen, made["gates"], y)
    torch.testing.assert_close(moe_experts(**made, activation=activation, kernel="reference"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, gates, w_up, w_down, ids = inputs(4, 2, 3, 2, 3, activation).values()
    run = lambda x, gates, w_up, w_down: moe_experts(  # noqa: E731
        x, ids, gates, w_up, w_down, activation=activation, kernel="reference"
    )
    torch.autograd.gradcheck(run, (x, gates, w_up, w_down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees(kernel, shape, activation, dtype):
    judge(kernel, inputs(*shape, activation, dtype), activation)


def one_token_is_its_row(kernel, **options):
    """T = 1 against the same token among others: one token's errors are too few to be judged as averages."""
    run = partial(moe_experts, kernel=kernel)
    made = inputs(5, 2, 3, 16, 8, unused=0, **options)
    (among,), gradients = outputs_and_gradients(run, made, None)
    alone = {n: t[:1].detach().requires_grad_(n != "expert_ids") for n, t in made.items() if n[0] != "w"}
    (out,), own = outputs_and_gradients(run, alone | {n: t for n, t in made.items() if n[0] == "w"}, None)
    torch.testing.assert_close(out, among[:1])
    for name in ("0:x", "1:gates"):
        torch.testing.assert_close(own[name], gradients[name][:1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token(kernel):
    one_token_is_its_row(kernel, dtype=torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_twice_and_gates_of_any_float(kernel):
    made = inputs(6, 3, 3, 16, 8, dtype=torch.bfloat16)
    made["expert_ids"] = torch.tensor([[1, 1, 0]] * 6, dtype=torch.int32)
    made["gates"] = made["gates"].detach().bfloat16().requires_grad_()
    judge(kernel, made)


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_contiguous(kernel):
    made = inputs(12, 2, 3, 16, 8, dtype=torch.float32)
    strided = {n: made[n].detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n in ("x", "gates", "w_up")}
    strided["w_down"] = made["w_down"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    judge(kernel, strided | {"expert_ids": made["expert_ids"].T.contiguous().T})


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_without_tokens_and_tokens_without_experts(kernel):
    made = inputs(20, 2, 5, 8, 8, dtype=torch.float32, empty=(0, 3))
    made["expert_ids"][7] = -1
    judge(kernel, made)
    (out,), gradients = outputs_and_gradients(partial(moe_experts, kernel=kernel), made, None)
    assert (out[7] == 0).all() and (gradients["0:x"][7] == 0).all()
    assert (gradients["1:gates"][made["expert_ids"] == -1] == 0).all()
    for name in ("2:w_up", "3:w_down"):
        assert (gradients[name][[0, 3]] == 0).all() and (gradients[name][1] != 0).any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8, 8), (5, 0, 3, 8, 8)], ids=str)
def test_nothing_routed_gives_zero_gradients(shape):
    """Zeros and not None: data parallelism waits for every parameter's gradient."""
    made = inputs(*shape, dtype=torch.float32)
    (out,), gradients = outputs_and_gradients(partial(moe_experts, kernel="torch"), made, None)
    assert out.shape == made["x"].shape and (out == 0).all()
    assert all(g is not None and (g == 0).all() for g in gradients.values())


def test_rows_past_the_last_offset_never_matter(monkeypatch):
    """The grouped product leaves them unwritten: write NaN there."""
    grouped = torch._grouped_mm

    def poisoned(a, b, offs):
        y = grouped(a, b, offs=offs)
        if b.dim() == 3:
            y[offs[-1] :] = torch.nan
        return y

    monkeypatch.setattr(torch, "_grouped_mm", poisoned)
    for activation in ACTIVATIONS:
        judge("torch", inputs(30, 3, 4, 16, 8, activation, torch.float32, unused=0.5), activation)


@pytest.mark.parametrize("wrong", [3, -2])
def test_a_wrong_id_is_nan_where_it_can_t_be_checked(wrong):
    """The operator refuses it on a CPU; on CUDA it gets as far as this."""
    made = inputs(4, 2, 3, 8, 8, dtype=torch.float32, unused=0)
    made["expert_ids"][2, 1] = wrong
    out = library.moe_experts(**made)
    assert out.isnan().all(1).tolist() == [False, False, True, False] and not out[[0, 1, 3]].isnan().any()


def test_same_bits_and_opcheck():
    made = inputs(20, 3, 4, 16, 8, "swiglu", torch.float32)
    same_bits(partial(moe_experts, activation="swiglu", kernel="torch"), made)
    # every slot used: rows past the last offset may differ
    made = inputs(12, 2, 4, 16, 8, "swiglu", torch.float32, unused=0)
    arguments = [made[n] for n in ("x", "expert_ids", "gates", "w_up", "w_down")]
    torch.library.opcheck(torch.ops.nam56r.moe_experts, (*arguments, "swiglu"))
    out, *kept = torch.ops.nam56r.moe_experts(*(t.detach() for t in arguments), "swiglu")
    backward = (out, *(t.detach() for t in arguments), *kept, "swiglu")
    torch.library.opcheck(torch.ops.nam56r.moe_experts_backward, backward)


def test_compiles():
    made = inputs(12, 2, 4, 16, 8, dtype=torch.float32)
    compiled = torch.compile(library.moe_experts, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(library.moe_experts, made, None)
    torch.testing.assert_close(outputs_and_gradients(compiled, made, None), expected)


def test_triton_interpreted():
    """Triton reads TRITON_INTERPRET when it is imported, so this file runs itself in a process of its own."""
    subprocess.run([sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)


def specs(T=8192, K=4, E=16, D=4096, F=896, dtype=torch.bfloat16):
    return {
        "x": Spec((T, D), dtype),
        "expert_ids": Spec((T, K), torch.int32),
        "gates": Spec((T, K), torch.float32),
        "w_up": Spec((E, F, D), dtype),
        "w_down": Spec((E, D, F), dtype),
        "activation": "relu2",
    }


def test_planned_on_a_gpu():
    assert select(Problem.of("moe_experts", DEVICES["h200"], **specs())).name == "torch"


@pytest.mark.parametrize(
    "device, change, match",
    [
        ("h200", {"dtype": torch.float32}, "only bfloat16 is graph-safe"),
        ("h200", {"F": 900}, "F = 900 must be multiples of 8"),
        ("h200", {"E": 1024}, "fewer than 1024 experts"),
        ("a100", {}, "offsets are read on the host"),
        ("b200", {}, "172439"),
    ],
)
def test_refused_on_a_gpu(device, change, match):
    with pytest.raises(NoKernel, match=match):
        select(Problem.of("moe_experts", DEVICES[device], **specs(**change)))


def test_float64_and_odd_widths_take_the_reference_on_a_cpu():
    for change in ({"dtype": torch.float64}, {"D": 100}):
        assert select(Problem.of("moe_experts", DEVICES["cpu"], **specs(**change))).name == "reference"


GOOD = {"x": (3, 8), "gates": (3, 2), "w_up": (4, 16, 8), "w_down": (4, 8, 16)}
IDS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"x": torch.ones(8)}, ValueError, r"x is \[8\], but must be \[T, D\]"),
        ({"expert_ids": IDS.long()}, TypeError, "expert_ids is int64, but must be int32"),
        ({"expert_ids": IDS + 4}, ValueError, "expert_ids has 4, but must be in 0 … E − 1 = 3 or −1"),
        ({"expert_ids": IDS - 2}, ValueError, "expert_ids has -2"),
        ({"gates": torch.ones(3, 1)}, ValueError, r"gates is \[3, 1\], but must be \[T=3, K=2\]"),
        ({"gates": IDS}, TypeError, "gates is int32"),
        ({"w_up": torch.ones(4, 8, 8)}, ValueError, r"w_up is \[4, 8, 8\], but must be \[E=4, F=16, D=8\]"),
        ({"activation": "swiglu"}, ValueError, r"w_up is \[4, 16, 8\], but must be \[E=4, 2F=32, D=8\]"),
        ({"w_down": torch.ones(4, 8, 16).half()}, TypeError, "w_down is float16, but must be float32"),
        ({"w_down": torch.ones(0, 8, 16), "w_up": torch.ones(0, 16, 8)}, ValueError, "E = 0"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', but must be one of 'relu2', 'swiglu'"),
    ],
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        moe_experts(**({n: torch.ones(shape) for n, shape in GOOD.items()} | {"expert_ids": IDS} | change))


GPU_SHAPES = [(130, 1, 1, 64, 128), (300, 3, 5, 136, 72), (1000, 4, 16, 512, 1032)]


@pytest.mark.gpu
@pytest.mark.parametrize("unused", [0.0, 0.6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_agrees(shape, activation, unused):
    poison("cuda")
    judge("torch", inputs(*shape, activation, torch.bfloat16, unused=unused, device="cuda"), activation)


@pytest.mark.gpu
def test_gpu_one_token():
    one_token_is_its_row("torch", dtype=torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_reference_by_name(dtype):
    judge("reference", inputs(37, 3, 5, 24, 16, dtype=dtype, device="cuda"))


@pytest.mark.gpu
def test_gpu_experts_without_tokens():
    made = inputs(400, 2, 5, 256, 128, dtype=torch.bfloat16, empty=(0, 3, 4), device="cuda")
    run = partial(moe_experts, kernel="torch")
    poison("cuda")
    _, gradients = outputs_and_gradients(run, made, None)
    for name in ("2:w_up", "3:w_down"):
        assert (gradients[name][[0, 3, 4]] == 0).all()
    none = made | {"expert_ids": torch.full_like(made["expert_ids"], -1)}
    poison("cuda")
    (out,), gradients = outputs_and_gradients(run, none, None)
    assert (out == 0).all() and all((g == 0).all() for g in gradients.values())


@pytest.mark.gpu
def test_gpu_takes_misaligned_and_strided():
    made = inputs(64, 2, 3, 64, 32, dtype=torch.bfloat16, device="cuda")
    for name in ("x", "w_up", "w_down"):
        flat = F.pad(made[name].detach().flatten(), (1, 0))[1:]
        made[name] = flat.view(made[name].shape).requires_grad_()
    judge("torch", made)
    made["w_down"] = made["w_down"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    made["x"] = made["x"].detach().repeat_interleave(2, -1)[:, ::2].requires_grad_()
    judge("torch", made)


@pytest.mark.gpu
def test_gpu_wrong_id_is_nan():
    made = inputs(4, 2, 3, 16, 8, dtype=torch.bfloat16, unused=0, device="cuda")
    made["expert_ids"][2, 1] = 3
    assert moe_experts(**made).isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpu_repeats_and_replays(activation):
    make = partial(inputs, 500, 4, 8, 256, 136, activation, torch.bfloat16, unused=0.3, device="cuda")
    run = partial(moe_experts, activation=activation)
    same_bits(run, make())
    replays(run, lambda seed: make(seed=seed))


@pytest.mark.gpu
def test_gpu_large():
    """Rows of 4096 beyond 2³¹ elements: the last token must be as right as the first."""
    made = inputs(8, 4, 4, 4096, 64, dtype=torch.bfloat16, unused=0, device="cuda")
    with torch.no_grad():
        small = moe_experts(**made)
        many = made | {n: made[n].detach().repeat(20_000, 1) for n in ("x", "gates", "expert_ids")}
        assert error(moe_experts(**many)[-8:], small) < 0.005  # other tiles, so not the same bits


if __name__ == "__main__":
    for name in ACTIVATIONS:
        for size in ((9, 3, 4, 16, 8), (2, 1, 2, 8, 1032)):
            judge("torch", inputs(*size, name, torch.float32), name, factor=4)  # the interpreter sums in its own order
