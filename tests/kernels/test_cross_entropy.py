"""Linear and cross-entropy: every kernel against the definition, in one block and in many."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.cross_entropy import library, linear_cross_entropy, reference
from nam56r.kernels.registry import DEVICES, Problem, Spec, select
from nam56r.kernels.testing import agree, kernels_here, outputs_and_gradients, replays, same_bits

KERNELS = kernels_here("linear_cross_entropy")
SHAPES = [(1, 1, 1), (1, 8, 50), (37, 24, 50), (64, 16, 33), (0, 8, 5)]  # T, D, V
Z = 1e-2


def inputs(T, D, V, dtype=torch.float64, *, ignored=0.2, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = -100
    made = {"hidden": draw(T, D), "weight": draw(V, D) * D**-0.5}
    return {n: t.to(device, dtype).requires_grad_() for n, t in made.items()} | {"labels": labels.to(device)}


def judge(kernel, made, **options):
    dtype = made["hidden"].dtype
    definition = partial(reference.linear_cross_entropy, **options)
    same = None if dtype == torch.float32 else partial(definition, compute_dtype=dtype)
    agree(partial(linear_cross_entropy, kernel=kernel, **options), definition, made, same_dtype=same)


@pytest.fixture
def many_blocks(monkeypatch):
    """Blocks of 3 tokens and of 7 columns, so that the last ones are partly filled."""
    for name, size in (("LOGITS", 1), ("ROWS", 3), ("COLUMNS", 7)):
        monkeypatch.setattr(library, name, size)


def test_definition_is_pytorch_s():
    made = inputs(37, 24, 50)
    logits = made["hidden"] @ made["weight"].T
    z = torch.where(made["labels"] == -100, 0, logits.exp().sum(-1).log().square())
    expected = F.cross_entropy(logits, made["labels"], reduction="none") + Z * z
    torch.testing.assert_close(linear_cross_entropy(**made, z_loss=Z, kernel="reference"), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel):
    hidden, weight, labels = inputs(4, 3, 5, ignored=0.4).values()
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, z_loss=Z, kernel=kernel), (hidden, weight))


@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees(kernel, shape, dtype, z_loss):
    judge(kernel, inputs(*shape, dtype), z_loss=z_loss)


@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_in_many_blocks(many_blocks, dtype, z_loss):
    judge("torch", inputs(37, 24, 50, dtype), z_loss=z_loss)


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_contiguous(kernel):
    made = inputs(12, 16, 20, torch.float32)
    judge(
        kernel,
        {
            "hidden": made["hidden"].detach().repeat_interleave(2, -1)[:, ::2].requires_grad_(),
            "weight": made["weight"].detach().T.contiguous().T.requires_grad_(),
            "labels": made["labels"].repeat_interleave(3)[::3],
        },
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_ignored_tokens_give_nothing(kernel):
    made = inputs(9, 8, 11, torch.float32, ignored=0)
    made["labels"][2::3] = 7  # an ignore_index that is a label too
    (loss,), gradients = outputs_and_gradients(partial(linear_cross_entropy, ignore_index=7, kernel=kernel), made, None)
    kept = made["labels"] != 7
    assert (loss[~kept] == 0).all() and (gradients["0:hidden"][~kept] == 0).all()
    some = {"hidden": made["hidden"][kept], "labels": made["labels"][kept], "weight": made["weight"]}
    torch.testing.assert_close(loss[kept], linear_cross_entropy(**some, kernel=kernel))
    none = made | {"labels": torch.full((9,), -100)}
    _, gradients = outputs_and_gradients(partial(linear_cross_entropy, kernel=kernel), none, None)
    assert all((g == 0).all() for g in gradients.values())


def test_large_logits():
    made = inputs(5, 4, 6, torch.float32)
    judge("torch", made | {"hidden": (made["hidden"] * 1e3).detach().requires_grad_()})


@pytest.mark.parametrize("run", [library.linear_cross_entropy, reference.linear_cross_entropy])
def test_a_wrong_label_is_nan_where_it_can_t_be_checked(run, many_blocks):
    """The operator refuses it on a CPU; on CUDA it gets as far as this."""
    made = inputs(9, 4, 11, torch.float32, ignored=0)
    made["labels"][3:5] = torch.tensor([11, -1])
    loss = run(**made)
    assert loss.isnan().tolist() == [False] * 3 + [True] * 2 + [False] * 4
    gradient = torch.autograd.grad(loss.sum(), made["hidden"])[0]
    assert gradient.isnan().all(1).tolist() == loss.isnan().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_results(dtype):
    made = inputs(5, 8, 7, dtype)
    (loss,), gradients = outputs_and_gradients(linear_cross_entropy, made, None)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients.values()] == [dtype, dtype]


def test_same_bits_and_opcheck(many_blocks):
    made = inputs(20, 8, 30, torch.float32)
    same_bits(partial(linear_cross_entropy, z_loss=Z), made)
    torch.library.opcheck(torch.ops.nam56r.linear_cross_entropy, (*made.values(), -100, Z))
    constants = [t.detach() for t in made.values()]
    lse = torch.randn(20)
    torch.library.opcheck(torch.ops.nam56r.linear_cross_entropy_backward, (lse, *constants, lse, -100, Z))


def test_compiles():
    made = inputs(20, 8, 30, torch.float32)
    compiled = torch.compile(library.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(library.linear_cross_entropy, made, None)
    torch.testing.assert_close(outputs_and_gradients(compiled, made, None), expected)


def test_planned_on_a_gpu():
    specs = {
        "hidden": Spec((8192, 4096), torch.bfloat16),
        "weight": Spec((131072, 4096), torch.bfloat16),
        "labels": Spec((8192,), torch.int64),
    }
    assert select(Problem.of("linear_cross_entropy", DEVICES["h200"], **specs, z_loss=0.0)).name == "torch"


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"hidden": torch.ones(3)}, ValueError, r"hidden is \[3\], but must be \[T, D\]"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight is \[5, 3\], but must be \[V, D=4\]"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "weight is float16, but must be float32"),
        ({"labels": torch.zeros(2).long()}, ValueError, r"labels is \[2\], but must be \[T=3\]"),
        ({"labels": torch.zeros(3).int()}, TypeError, "labels is int32, but must be int64"),
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, "labels has 5, but must be in 0 … V − 1 = 4"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, "labels has -1"),
        ({"labels": torch.tensor([0, -100, 1]), "ignore_index": -1}, ValueError, "ignore_index = -1"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"z_loss": math.nan}, ValueError, "z_loss is nan"),
    ],
)
def test_bad_input(change, error, match):
    good = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "labels": torch.zeros(3).long()}
    with pytest.raises(error, match=match):
        linear_cross_entropy(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (513, 128, 977)], ids=str)
def test_gpu_agrees(shape, dtype, z_loss):
    judge("torch", inputs(*shape, dtype, device="cuda"), z_loss=z_loss)


@pytest.mark.gpu
def test_gpu_one_token():
    judge("torch", inputs(1, 256, 977, torch.bfloat16, ignored=0, device="cuda"), z_loss=Z)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_agrees_in_many_blocks(many_blocks, dtype):
    judge("torch", inputs(37, 24, 50, dtype, device="cuda"), z_loss=Z)


@pytest.mark.gpu
def test_gpu_repeats_and_replays():
    make = partial(inputs, 700, 256, 9000, torch.bfloat16, device="cuda")
    same_bits(partial(linear_cross_entropy, z_loss=Z), make())
    replays(partial(linear_cross_entropy, z_loss=Z), lambda seed: make(seed=seed))


@pytest.mark.gpu
def test_gpu_wrong_label_is_nan():
    made = inputs(5, 8, 11, torch.bfloat16, ignored=0, device="cuda")
    made["labels"][3] = 11
    assert linear_cross_entropy(**made).isnan().tolist() == [False, False, False, True, False]


@pytest.mark.gpu
def test_gpu_memory_at_the_recipe_s_shape():
    """Forward 2 blocks (256 MiB); backward 320 MiB beside its results (1088 MiB); a little more for the products' own."""
    made = inputs(8192, 16, 131072, torch.bfloat16, device="cuda")
    made["hidden"] = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    made["weight"] = torch.zeros(131072, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(**made)
    assert torch.cuda.max_memory_allocated() - before < 350 * 2**20
    loss.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < (1088 + 400) * 2**20
