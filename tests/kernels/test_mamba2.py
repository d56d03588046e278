"""Mamba-2: the chunked reference against plain steps."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.mamba2 import mamba2_scan, reference
from nam56r.kernels.registry import NoKernel
from nam56r.kernels.testing import agree, flatten, kernels_here, outputs_and_gradients, same_bits


def inputs(
    B=2, S=9, H=4, P=3, G=2, N=5, *, D="H", gate=True, state=None, ends=None, dtype=torch.float64, device="cpu", seed=0
):
    """D: "H", "H P" or None; state: rows of the initial state; ends: the packed sequences' bounds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    narrow = {"x": draw(B, S, H, P), "B": draw(B, S, G, N), "C": draw(B, S, G, N)}
    wide = {"dt": draw(B, S, H) - 2, "A": -draw(H).exp(), "dt_bias": 0.5 * draw(H)}
    if D:
        wide["D"] = draw(H) if D == "H" else draw(H, P)
    if gate:
        narrow["z"] = draw(B, S, H, P)
    if state is not None:
        wide["initial_state"] = draw(state, H, P, N)
    made = {name: t.to(device, dtype).requires_grad_() for name, t in narrow.items()}
    # what a model keeps in fp32
    made |= {name: t.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_() for name, t in wide.items()}
    made["dt_softplus"] = True
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return made


def steps(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, initial_state=None, cu_seqlens=None):
    """The equations, one step after the other, nothing else."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    heads = x.shape[2]
    group = torch.arange(heads) // (heads // B.shape[2])
    rows = [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    if cu_seqlens is not None:
        rows = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    outputs, finals = [], []
    for n, (b, start, end) in enumerate(rows):
        s = x.new_zeros(heads, x.shape[3], B.shape[3]) if initial_state is None else initial_state[n]
        for t in range(start, end):
            add = torch.einsum("h,hp,hn->hpn", dt[b, t], x[b, t], B[b, t, group])
            s = torch.exp(A * dt[b, t])[:, None, None] * s + add
            y = torch.einsum("hpn,hn->hp", s, C[b, t, group])
            if D is not None:
                y = y + (D if D.ndim == 2 else D[:, None]) * x[b, t]
            outputs.append(y if z is None else y * F.silu(z[b, t]))
        finals.append(s)
    return torch.stack(outputs).view(x.shape), torch.stack(finals)


def assert_equal(run, definition, made, tolerance=1e-10):
    got, got_gradients = outputs_and_gradients(run, made, torch.float64)
    want, want_gradients = outputs_and_gradients(definition, made, torch.float64)
    for mine, exact in zip([*got, *got_gradients.values()], [*want, *want_gradients.values()], strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("G, D, gate, state", [(1, None, False, None), (2, "H", True, 2), (4, "H P", True, 2)])
def test_equals_its_steps(S, G, D, gate, state):
    assert_equal(mamba2_scan, steps, inputs(S=S, G=G, D=D, gate=gate, state=state))


def test_without_softplus_and_bias():
    made = inputs(S=70)
    made["dt"] = made["dt"].detach().exp().requires_grad_()
    made |= {"dt_softplus": False, "dt_bias": None}
    assert_equal(mamba2_scan, steps, made)


@pytest.mark.parametrize("state", [None, 4])
def test_packed(state):
    assert_equal(mamba2_scan, steps, inputs(B=1, S=80, state=state, ends=[0, 3, 3, 79, 80]))


def test_a_run_in_two_parts_equals_one():
    def halves(initial_state, **made):
        whole = ("A", "D", "dt_bias", "dt_softplus")
        first, second = (
            {n: t if n in whole else t[:, part] for n, t in made.items()} for part in (slice(50), slice(50, None))
        )
        y, state = mamba2_scan(**first, initial_state=initial_state)
        more, state = mamba2_scan(**second, initial_state=state)
        return torch.cat((y, more), dim=1), state

    assert_equal(halves, mamba2_scan, inputs(S=90, state=2))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)
    size = {"S": 7, "H": 2, "P": 2, "N": 2, "state": 2}
    made = inputs(B=1, ends=[0, 5, 7], **size) if packed else inputs(**size)
    names = [name for name in made if name not in ("cu_seqlens", "dt_softplus")]
    fixed = {name: t for name, t in made.items() if name not in names}
    assert torch.autograd.gradcheck(lambda *t: mamba2_scan(**dict(zip(names, t)), **fixed), [made[n] for n in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    made = inputs(S=100, P=8, N=16, state=2, dtype=dtype)
    agree(mamba2_scan, reference.mamba2_scan, made, same_dtype=partial(reference.mamba2_scan, compute_dtype=dtype))
    y, final = mamba2_scan(**made)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)


def test_strong_decay_keeps_its_digits():
    """Now and then a step forgets everything: the sum of decays is then large, its later differences small."""
    made = inputs(S=128, dtype=torch.float32) | {"dt_softplus": False, "dt_bias": None}
    made["dt"] = torch.full_like(made["dt"], 1e-3)
    made["dt"][:, ::20] = 1000
    agree(mamba2_scan, steps, made, factor=4)


def test_not_contiguous():
    made = inputs(S=66, D="H P", state=2, dtype=torch.float32)
    matrices = [name for name, t in made.items() if isinstance(t, torch.Tensor) and t.ndim > 1]
    strided = made | {name: made[name].transpose(0, 1).contiguous().transpose(0, 1) for name in matrices}
    assert not any(strided[name].is_contiguous() for name in matrices)
    for mine, same in zip(mamba2_scan(**strided), mamba2_scan(**made)):
        torch.testing.assert_close(mine, same, rtol=1e-6, atol=1e-6)


def test_same_bits():
    same_bits(mamba2_scan, inputs(S=70, state=2, dtype=torch.float32))


@pytest.mark.parametrize("B, S", [(2, 0), (0, 5)])
def test_empty(B, S):
    made = inputs(B=B, S=S, state=B)
    y, final = mamba2_scan(**made)
    assert y.shape == (B, S, 4, 3)
    assert torch.equal(final, made["initial_state"])
    assert mamba2_scan(**inputs(B=1, S=0, ends=[0]))[1].shape == (0, 4, 3, 5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"dt": torch.zeros(2, 4, 9)}, ValueError, r"mamba2_scan: dt is \[2, 4, 9\], but must be \[B=2, S=9, H=4\]"),
        ({"B": torch.zeros(2, 9, 3, 5)}, ValueError, "C is"),
        ({"B": torch.zeros(2, 9, 3, 5), "C": torch.zeros(2, 9, 3, 5)}, ValueError, "G = 3 must divide H = 4"),
        ({"z": torch.zeros(2, 9, 4, 3).half()}, TypeError, "z is float16, but must be float32"),
        ({"D": torch.zeros(4, 2)}, ValueError, r"D is \[4, 2\], but must be \[H=4, P=3\]"),
        ({"dt_softplus": 2}, ValueError, "dt_softplus is 2"),
        ({"initial_state": torch.zeros(3, 4, 3, 5)}, ValueError, r"initial_state is \[3, 4, 3, 5\], but must be \[2,"),
        ({"cu_seqlens": torch.tensor([0, 9])}, TypeError, "cu_seqlens is int64, but must be int32"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mamba2_scan(**{**inputs(dtype=torch.float32), **change})


DTYPES = {"cuda": (torch.bfloat16, torch.float16), "reference": (torch.bfloat16, torch.float16, torch.float32)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel, dtype", [(k, dtype) for k in kernels_here("mamba2_scan") for dtype in DTYPES[k]], ids=str
)
def test_on_a_gpu(kernel, dtype):
    size = {"H": 16, "P": 64, "G": 8, "N": 128, "dtype": dtype, "device": "cuda"}
    for one in ({"S": 257, "state": 2}, {"B": 1, "S": 200, "state": 3, "ends": [0, 1, 1, 200]}):
        # the gradients of A, D and dt_bias are a few sums over all tokens: one draw's rounding says little of them
        draws = [inputs(**one, **size, seed=seed) for seed in range(4)]
        same_dtype = partial(reference.mamba2_scan, compute_dtype=dtype)
        agree(partial(mamba2_scan, kernel=kernel), reference.mamba2_scan, draws, same_dtype=same_dtype)
        assert all(t.is_cuda for t in flatten(mamba2_scan(**draws[0], kernel=kernel)))


@pytest.mark.gpu
def test_refused_on_a_gpu():
    with pytest.raises(NoKernel, match="cuda: x is torch.float32, but the CUDA kernel takes bfloat16 or float16"):
        mamba2_scan(**inputs(P=64, N=128, dtype=torch.float32, device="cuda"), kernel="cuda")
