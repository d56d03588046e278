"""M²RNN: the chunked reference with its written-out backward against plain steps under autograd."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from nam56r.kernels.m2rnn import m2rnn, reference
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec, select
from nam56r.kernels.testing import agree, flatten, kernels_here, outputs_and_gradients, same_bits


def inputs(B=2, S=9, H=6, Hq=1, Hk=1, K=5, V=3, *, state=None, ends=None, dtype=torch.float64, device="cpu", seed=0):
    """state: rows of the initial state; ends: the packed sequences' bounds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "q": draw(B, S, Hq, K),
        "k": draw(B, S, Hk, K),
        "v": draw(B, S, H, V),
        "weight": 0.8 * torch.eye(V, dtype=torch.float64)
        + 0.2 * draw(H, V, V) / V**0.5,  # a chaotic scan judges nothing
        "forget": torch.sigmoid(2 * draw(B, S, H)),
    }
    if state is not None:
        made["initial_state"] = draw(state, H, K, V)
    made = {name: t.to(device, dtype).requires_grad_() for name, t in made.items()}
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return made


def steps(q, k, v, weight, forget, initial_state=None, cu_seqlens=None):
    """The equations, one step after the other, nothing else."""
    B, S, H, V = v.shape
    q, k = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (q, k))
    rows = [(b, 0, S) for b in range(B)]
    if cu_seqlens is not None:
        rows = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    outputs, finals = [], []
    for n, (b, start, end) in enumerate(rows):
        h = torch.zeros(H, q.shape[-1], V, dtype=v.dtype) if initial_state is None else initial_state[n]
        for t in range(start, end):
            z = torch.tanh(torch.einsum("hkv,hvw->hkw", h, weight) + torch.einsum("hk,hv->hkv", k[b, t], v[b, t]))
            f = forget[b, t, :, None, None]
            h = f * h + (1 - f) * z
            outputs.append(torch.einsum("hk,hkv->hv", q[b, t], h))
        finals.append(h)
    return torch.stack(outputs).view(v.shape), torch.stack(finals)


def assert_equal(run, definition, made, tolerance=1e-10):
    got, got_gradients = outputs_and_gradients(run, made, torch.float64)
    want, want_gradients = outputs_and_gradients(definition, made, torch.float64)
    for mine, exact in zip([*got, *got_gradients.values()], [*want, *want_gradients.values()], strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("Hq, Hk, state", [(1, 1, None), (2, 3, 2), (6, 6, 2)])
def test_equals_its_steps(S, Hq, Hk, state):
    assert_equal(m2rnn, steps, inputs(S=S, Hq=Hq, Hk=Hk, state=state))


@pytest.mark.parametrize("state", [None, 4])
def test_packed(state):
    made = inputs(B=1, S=80, H=2, state=state, ends=[0, 3, 3, 79, 80])
    assert_equal(m2rnn, steps, made)


def test_packed_equals_separate_bit_for_bit():
    made = inputs(B=1, S=80, H=2, state=3, ends=[0, 70, 70, 80], dtype=torch.float32)
    y, final = m2rnn(**made)
    along = ("q", "k", "v", "forget")
    for n, (start, end) in enumerate(pairwise([0, 70, 70, 80])):
        part = {name: made[name][:, start:end] for name in along}
        y_n, final_n = m2rnn(**part, weight=made["weight"], initial_state=made["initial_state"][n : n + 1])
        assert torch.equal(y_n, y[:, start:end])
        assert torch.equal(final_n, final[n : n + 1])


def test_a_run_in_two_parts_equals_one():
    def halves(q, k, v, weight, forget, initial_state):
        first = m2rnn(q[:, :50], k[:, :50], v[:, :50], weight, forget[:, :50], initial_state)
        second = m2rnn(q[:, 50:], k[:, 50:], v[:, 50:], weight, forget[:, 50:], first[1])
        return torch.cat((first[0], second[0]), dim=1), second[1]

    assert_equal(halves, m2rnn, inputs(S=90, state=2))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)
    made = inputs(B=1, S=7, H=2, K=2, V=2, state=2, ends=[0, 5, 7]) if packed else inputs(S=7, H=2, K=2, V=2, state=2)
    names = [name for name in made if name != "cu_seqlens"]
    fixed = {"cu_seqlens": made.get("cu_seqlens")}
    assert torch.autograd.gradcheck(lambda *t: m2rnn(**dict(zip(names, t)), **fixed), [made[n] for n in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    made = inputs(S=100, H=3, K=8, V=8, state=2, dtype=dtype)
    agree(m2rnn, reference.m2rnn, made, same_dtype=partial(reference.m2rnn, compute_dtype=dtype))
    y, final = m2rnn(**made)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)


def test_the_state_is_kept_in_fp32():
    """f = 0.999 for 2000 steps: a bf16 state would stop moving long before its limit."""
    made = inputs(B=1, S=2000, H=1, K=2, V=2, dtype=torch.bfloat16)
    made = {name: t.detach() for name, t in made.items()} | {"forget": torch.full((1, 2000, 1), 0.999)}
    exact, _ = reference.m2rnn(**{name: t.double() for name, t in made.items()})
    rounded, _ = reference.m2rnn(**made, compute_dtype=torch.bfloat16)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_not_contiguous():
    made = inputs(S=66, Hq=2, state=2, dtype=torch.float32)
    strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in made.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    for mine, same in zip(m2rnn(**strided), m2rnn(**made)):
        assert torch.equal(mine, same)


def test_same_bits():
    same_bits(m2rnn, inputs(S=70, state=2, dtype=torch.float32))


@pytest.mark.parametrize("B, S", [(2, 0), (0, 5)])
def test_empty(B, S):
    made = inputs(B=B, S=S, state=B)
    y, final = m2rnn(**made)
    assert y.shape == (B, S, 6, 3)
    assert torch.equal(final, made["initial_state"])
    assert m2rnn(**inputs(B=1, S=0, ends=[0]))[1].shape == (0, 6, 5, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.zeros(2, 8, 1, 5)}, ValueError, r"m2rnn: k is \[2, 8, 1, 5\], but must be \[B=2, S=9, Hk, K=5\]"),
        ({"k": torch.zeros(2, 9, 4, 5)}, ValueError, "Hk = 4 must divide H = 6"),
        ({"v": torch.zeros(2, 9, 6, 3).double()}, TypeError, "v is float64, but must be float32"),
        ({"weight": torch.zeros(6, 3, 4)}, ValueError, "weight is"),
        ({"forget": None}, TypeError, "forget is NoneType"),
        ({"initial_state": torch.zeros(1, 6, 5, 3)}, ValueError, r"initial_state is \[1, 6, 5, 3\], but must be \[2,"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, "B must be 1, not 2"),
        ({"kernel": "fast"}, ValueError, "no kernel 'fast': one of reference"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        m2rnn(**{**inputs(dtype=torch.float32), **change})


def test_refused_on_a_gpu_unless_named():
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in inputs().items()}
    problem = Problem.of("m2rnn", device=DEVICES["h200"], **specs)
    assert select(problem, "reference").role == "development"
    with pytest.raises(NoKernel, match="only when asked for by name"):
        select(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kernel", kernels_here("m2rnn"))
def test_on_a_gpu(kernel, dtype):
    for made in (
        inputs(S=257, H=51, K=64, V=16, state=2, dtype=dtype, device="cuda"),
        inputs(B=1, S=100, K=64, V=16, state=3, ends=[0, 1, 1, 100], dtype=dtype, device="cuda"),
    ):
        same_dtype = partial(reference.m2rnn, compute_dtype=dtype)
        agree(partial(m2rnn, kernel=kernel), reference.m2rnn, made, same_dtype=same_dtype)
        assert all(t.is_cuda for t in flatten(m2rnn(**made, kernel=kernel)))
