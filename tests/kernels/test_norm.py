"""RMSNorm: every kernel against the definition, the definition against another one."""

from functools import partial

import pytest
import torch

from nam56r.kernels.norm import reference, rms_norm
from nam56r.kernels.registry import DEVICES, Problem, Spec, select
from nam56r.kernels.testing import agree, kernels_here, replays, same_bits

KERNELS = kernels_here("rms_norm")
SHAPES = [(1,), (1, 1), (3, 977), (2, 5, 64), (0, 8)]
EPS = 1e-5


def inputs(shape, dtype, *, weight_dtype=None, residual=False, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {"x": draw(*shape).to(dtype), "weight": (1 + 0.3 * draw(shape[-1])).to(weight_dtype or dtype)}
    if residual:
        made["residual"] = draw(*shape).to(dtype)
    return {name: t.to(device).requires_grad_() for name, t in made.items()}


def judge(kernel, made):
    dtype = made["x"].dtype
    same = None if dtype == torch.float32 else partial(reference.rms_norm, eps=EPS, compute_dtype=dtype)
    agree(partial(rms_norm, eps=EPS, kernel=kernel), partial(reference.rms_norm, eps=EPS), made, same_dtype=same)


def test_definition():
    x, weight, residual = inputs((4, 9), torch.float64, residual=True).values()
    s = x + residual
    expected = torch.stack([9**0.5 * row / (row @ row + 9 * EPS).sqrt() * weight for row in s])
    y, new_residual = reference.rms_norm(x, weight, EPS, residual)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new_residual, s)
    assert not isinstance(rms_norm(x, weight, EPS), tuple)


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(residual):
    made = inputs((3, 5), torch.float64, residual=residual)
    run = lambda x, weight, residual=None: reference.rms_norm(x, weight, EPS, residual)  # noqa: E731
    torch.autograd.gradcheck(run, tuple(made.values()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees(kernel, shape, dtype, residual):
    judge(kernel, inputs(shape, dtype, residual=residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_weight(kernel, dtype):
    made = inputs((3, 64), dtype, weight_dtype=torch.float32)
    judge(kernel, made)
    y = rms_norm(**made, eps=EPS, kernel=kernel)
    y.sum().backward()
    assert (y.dtype, made["x"].grad.dtype, made["weight"].grad.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_contiguous(kernel):
    made = inputs((6, 8), torch.float32, residual=True)
    strided = {"x": made["x"].detach().T.contiguous().T, "weight": made["weight"].detach().repeat_interleave(2)[::2]}
    strided["residual"] = made["residual"].detach().repeat_interleave(2, 0)[::2]
    judge(kernel, {name: t.requires_grad_() for name, t in strided.items()})


@pytest.mark.parametrize("kernel", KERNELS)
def test_eps_matters(kernel):
    """Rows far smaller than eps stay small: x / sqrt(eps)."""
    x = torch.full((1, 4), 1e-6)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), 1e-2, kernel=kernel), x * 10, rtol=1e-4, atol=0)


def test_planned_on_a_gpu():
    specs = {"x": Spec((8192, 4096), torch.bfloat16), "weight": Spec((4096,), torch.bfloat16), "residual": None}
    assert select(Problem.of("rms_norm", DEVICES["h200"], **specs)).name == "torch"


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": torch.ones(3, 5)}, ValueError, r"weight is \[4\], but must be \[D=5\]"),
        ({"x": torch.ones(())}, ValueError, r"x is \[\]"),
        ({"x": torch.ones(3, 4).long()}, TypeError, "x is int64"),
        ({"weight": torch.ones(4).half()}, TypeError, "weight is float16, but must be float32"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual is \[2, 4\]"),
        ({"residual": torch.ones(3, 4).half()}, TypeError, "residual is float16"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"eps": None}, ValueError, "eps is None"),
        ({"kernel": "fast"}, ValueError, "no kernel 'fast'"),
    ],
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        rms_norm(**({"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": EPS} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (513, 4096)], ids=str)
def test_gpu_agrees(shape, dtype, weight_dtype, residual):
    judge("torch", inputs(shape, dtype, weight_dtype=weight_dtype, residual=residual, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 4096)], ids=str)
def test_gpu_one_row(shape):
    judge("torch", inputs(shape, torch.bfloat16, device="cuda"))


@pytest.mark.gpu
def test_gpu_repeats_and_replays():
    run = partial(rms_norm, eps=EPS)
    make = partial(inputs, (1000, 3584), torch.bfloat16, residual=True, device="cuda")
    same_bits(run, make())
    replays(run, lambda seed: make(seed=seed))
