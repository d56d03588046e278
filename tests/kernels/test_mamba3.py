"""Mamba-3: the chunked reference against plain steps, whose rotation is complex multiplication."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nam56r.kernels.mamba3 import Mamba3State, mamba3_scan, reference
from nam56r.kernels.registry import NoKernel
from nam56r.kernels.testing import agree, flatten, kernels_here, outputs_and_gradients, same_bits

SCALARS = ("dt", "log_decay", "trap")  # [B, H, S]
PARAMETERS = ("B_bias", "C_bias", "D", "mimo", "initial_state", "cu_seqlens")  # no sequence


def inputs(
    B=2, S=9, H=4, P=3, G=2, N=8, N_a=2, R=None, *, shared=True, gate=True, state=None, ends=None, dtype=torch.float64,
    device="cpu", seed=0,
):  # fmt: skip
    """R: MIMO rank, None for SISO; shared: angles over heads; state: rows of the initial state; ends: packed bounds."""
    generator = torch.Generator().manual_seed(seed)
    rank = R or 1
    fp32 = torch.promote_types(dtype, torch.float32)

    def leaf(t, dtype):
        return t.to(device, dtype, copy=True).requires_grad_()

    def draw(*shape, dtype=fp32):  # fp32: what a model keeps in fp32
        return leaf(torch.randn(shape, generator=generator, dtype=torch.float64), dtype)

    dt = F.softplus(torch.randn(B, H, S, generator=generator, dtype=torch.float64) - 1)
    log_decay = -dt * torch.rand(B, H, S, generator=generator, dtype=torch.float64)
    made = {
        "x": draw(B, S, H, P, dtype=dtype),
        "B": draw(B, S, rank, G, N, dtype=dtype),
        "C": draw(B, S, rank, G, N, dtype=dtype),
        "dt": leaf(dt, fp32),
        "log_decay": leaf(log_decay, fp32),
        "trap": draw(B, H, S, dtype=dtype),
        "angles": draw(B, S, 1 if shared else H, N_a),
        "B_bias": draw(H, rank, N),
        "C_bias": draw(H, rank, N),
        "D": draw(H),
    }
    if gate:
        made["z"] = draw(B, S, H, P, dtype=dtype)
    if R:
        made["mimo"] = tuple(draw(H, R, P) for _ in range(3))
    if state is not None:
        shapes = (H, P, N), (H, rank, N), (H, rank, P), (H, N_a)
        made["initial_state"] = Mamba3State(*(draw(state, *shape) for shape in shapes))
    if ends is not None:
        made["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return made


def rotated(t, angle, siso):
    """Pairs of t [..., N] as complex numbers, the first N_a of them times e^{i angle}."""
    half = t.shape[-1] // 2
    pairs = torch.view_as_complex((t.unflatten(-1, (half, 2)) if siso else t.unflatten(-1, (2, half)).mT).contiguous())
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_real(torch.cat((pairs[..., : len(angle)] * turn, pairs[..., len(angle) :]), dim=-1))
    return (turned if siso else turned.mT).flatten(-2)


def steps(
    x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z=None, *, mimo=None, initial_state=None, cu_seqlens=None
):
    """The equations, one step and one head after the other, nothing else."""
    batch, length, heads, headdim = x.shape
    rank, groups, d_state = B.shape[2:]
    one = x.new_ones(heads, 1, headdim)
    psi, zeta, phi = mimo or (one, one, one)
    rows = [(b, 0, length) for b in range(batch)]
    if cu_seqlens is not None:
        rows = [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    y = {}
    finals = []
    for n, (b, start, end) in enumerate(rows):
        for h in range(heads):
            group, beside = h // (heads // groups), min(h, angles.shape[2] - 1)
            s, k, v = x.new_zeros(headdim, d_state), x.new_zeros(rank, d_state), x.new_zeros(rank, headdim)
            theta = x.new_zeros(angles.shape[-1])
            if initial_state is not None:
                s, k, v, theta = (t[n, h] for t in initial_state)
            for t in range(start, end):
                step, lam, alpha = dt[b, h, t], torch.sigmoid(trap[b, h, t]), torch.exp(log_decay[b, h, t])
                theta = (theta + math.pi * torch.tanh(angles[b, t, beside]) * step) % (2 * math.pi)
                s = alpha * s + (1 - lam) * step * alpha * v.mT @ k
                k = rotated(B[b, t, :, group] + B_bias[h], theta, mimo is None)
                q = rotated(C[b, t, :, group] + C_bias[h], theta, mimo is None)
                v = x[b, t, h] * psi[h]
                s = s + lam * step * v.mT @ k
                out = (q @ s.mT + D[h] * v) * phi[h]
                y[b, t, h] = (out if z is None else out * F.silu(z[b, t, h] * zeta[h])).sum(0)
            finals.append((s, k, v, theta))
    y = torch.stack([y[b, t, h] for b in range(batch) for t in range(length) for h in range(heads)])
    return y.view(x.shape), tuple(torch.stack(t).unflatten(0, (-1, heads)) for t in zip(*finals))


def assert_equal(run, definition, made, tolerance=1e-10):
    got, got_gradients = outputs_and_gradients(run, made, torch.float64)
    want, want_gradients = outputs_and_gradients(definition, made, torch.float64)
    for mine, exact in zip([*got, *got_gradients.values()], [*want, *want_gradients.values()], strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S", [1, 2, 8, 13])
@pytest.mark.parametrize("R", [None, 1, 2, 4])
@pytest.mark.parametrize("state", [None, 2])
def test_equals_its_steps(S, R, state, monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 4 * (R or 1))  # chunks of four steps
    assert_equal(mamba3_scan, steps, inputs(S=S, R=R, state=state))


@pytest.mark.parametrize("R", [None, 4])
@pytest.mark.parametrize(
    "shape",
    [{"G": 1}, {"G": 4}, {"N_a": 1}, {"N_a": 4}, {"N_a": 3, "shared": False}, {"gate": False}],
    ids=str,
)
def test_groups_angles_and_gate(R, shape):
    made = inputs(S=6, R=R, **shape)
    if R and "gate" in shape:  # nothing reads ζ then
        made["mimo"][1].requires_grad_(False)
    assert_equal(mamba3_scan, steps, made)


@pytest.mark.parametrize("R", [None, 2])
def test_the_chunk_is_our_choice(R, monkeypatch):
    made = inputs(S=150, R=R, state=2)
    whole = mamba3_scan(**made)
    monkeypatch.setattr(reference, "ROWS", 1000)
    for mine, same in zip(flatten(whole), flatten(mamba3_scan(**made)), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("R, state", [(None, None), (None, 4), (2, None), (2, 4)])
def test_packed(R, state, monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 4 * (R or 1))
    assert_equal(mamba3_scan, steps, inputs(B=1, S=15, R=R, state=state, ends=[0, 3, 3, 14, 15]))


@pytest.mark.parametrize("R", [None, 4])
def test_a_run_in_two_parts_equals_one(R):
    def halves(initial_state, **made):
        def part(at):
            return {n: t if n in PARAMETERS else t[..., at] if n in SCALARS else t[:, at] for n, t in made.items()}

        y, state = mamba3_scan(**part(slice(37)), initial_state=initial_state)
        more, state = mamba3_scan(**part(slice(37, None)), initial_state=state)
        return torch.cat((y, more), dim=1), state

    assert_equal(halves, mamba3_scan, inputs(S=70, R=R, state=2))


@pytest.mark.parametrize("R", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(R, packed, monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 3 * (R or 1))
    size = {"S": 5, "H": 2, "P": 2, "N": 4, "N_a": 1, "R": R, "state": 2}
    made = inputs(B=1, G=1, ends=[0, 4, 5], **size) if packed else inputs(**size)
    fixed = {"cu_seqlens": made.pop("cu_seqlens", None)}

    def run(*leaves):
        leaves = iter(leaves)
        mimo = tuple(next(leaves) for _ in made.get("mimo", ()))
        state = Mamba3State(*(next(leaves) for _ in range(4)))
        rest = dict(zip((n for n in made if n not in ("mimo", "initial_state")), leaves, strict=True))
        return flatten(mamba3_scan(**rest, **fixed, mimo=mimo or None, initial_state=state))

    rest = [t for name, t in made.items() if name not in ("mimo", "initial_state")]
    assert torch.autograd.gradcheck(run, [*made.get("mimo", ()), *made["initial_state"], *rest], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("R", [None, 4])
def test_low_precision(R, dtype):
    made = inputs(S=70, P=8, N=16, N_a=4, R=R, state=2, dtype=dtype)
    agree(mamba3_scan, reference.mamba3_scan, made, same_dtype=partial(reference.mamba3_scan, compute_dtype=dtype))
    y, final = mamba3_scan(**made)
    assert y.dtype == dtype
    assert {t.dtype for t in final} == {torch.float32}


def test_angles_stay_right_over_65536_steps():
    made = inputs(B=1, S=65_536, H=1, P=1, G=1, N=4, N_a=2, gate=False, dtype=torch.float32)
    made = {name: t.detach() for name, t in made.items()}
    made["angles"] = made["angles"].abs()  # one way round, all of it
    _, final = mamba3_scan(**made)
    turned = math.pi * torch.tanh(made["angles"].double())[0, :, 0] * made["dt"].double()[0, 0, :, None]
    apart = (final.angle[0, 0].double() - turned.sum(0) + math.pi) % (2 * math.pi) - math.pi
    assert (final.angle >= 0).all() and (final.angle < 2 * math.pi).all()
    assert (turned.sum(0) > 4e4).all()
    assert apart.abs().max() < 1e-3


@pytest.mark.parametrize("R", [None, 2])
def test_not_contiguous(R):
    made = inputs(S=70, R=R, dtype=torch.float32)
    tensors = [name for name, t in made.items() if isinstance(t, torch.Tensor) and t.ndim > 1 and name[1:] != "_bias"]
    strided = made | {name: made[name].transpose(0, 1).contiguous().transpose(0, 1) for name in tensors}
    assert not any(strided[name].is_contiguous() for name in tensors)
    for mine, same in zip(flatten(mamba3_scan(**strided)), flatten(mamba3_scan(**made)), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-5, atol=1e-5)


def test_same_bits():
    same_bits(mamba3_scan, inputs(S=70, R=4, state=2, dtype=torch.float32))


@pytest.mark.parametrize("B, S", [(2, 0), (0, 5)])
@pytest.mark.parametrize("R", [None, 2])
def test_empty(B, S, R):
    made = inputs(B=B, S=S, R=R, state=B)
    y, final = mamba3_scan(**made)
    assert y.shape == (B, S, 4, 3)
    assert all(map(torch.equal, final, made["initial_state"]))
    assert mamba3_scan(**inputs(B=1, S=0, R=R, ends=[0]))[1].ssm.shape == (0, 4, 3, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"C": torch.zeros(2, 9, 1, 1, 8)}, ValueError, r"mamba3_scan: C is \[2, 9, 1, 1, 8\], but must be \[B=2, S=9"),
        ({"dt": torch.zeros(2, 9, 4)}, ValueError, r"dt is \[2, 9, 4\], but must be \[B=2, H=4, S=9\]"),
        ({"angles": torch.zeros(2, 9, 2, 2)}, ValueError, r"angles is \[2, 9, 2, 2\]"),
        ({"angles": torch.zeros(2, 9, 1, 5)}, ValueError, "N_a = 5 pairs of N = 8"),
        ({"B": torch.zeros(2, 9, 2, 2, 8), "C": torch.zeros(2, 9, 2, 2, 8)}, ValueError, "B_bias is"),
        ({"D": None}, TypeError, "D is NoneType"),
        ({"z": torch.zeros(2, 9, 4, 3).half()}, TypeError, "z is float16, but must be float32"),
        ({"mimo": (torch.zeros(4, 1, 3),)}, TypeError, r"mimo must be a tuple \(psi, zeta, phi\)"),
        (
            {"mimo": (torch.zeros(4, 2, 3),) * 3},
            ValueError,
            r"mimo's psi is \[4, 2, 3\], but must be \[H=4, R=1, P=3\]",
        ),
        ({"initial_state": torch.zeros(2)}, TypeError, "initial_state is Tensor, but must be a Mamba3State"),
        ({"initial_state": Mamba3State(*(torch.zeros(2),) * 4)}, ValueError, r"initial_state.ssm is \[2\]"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mamba3_scan(**{**inputs(dtype=torch.float32), **change})


def test_a_rank_needs_mimo():
    with pytest.raises(ValueError, match="mimo is None, but must be .* when B has R = 2"):
        mamba3_scan(**{**inputs(R=2), "mimo": None})


DTYPES = {"cuda": (torch.bfloat16, torch.float16), "reference": (torch.bfloat16, torch.float16, torch.float32)}


@pytest.mark.gpu
@pytest.mark.parametrize("R", [None, 4])
@pytest.mark.parametrize(
    "kernel, dtype", [(k, dtype) for k in kernels_here("mamba3_scan") for dtype in DTYPES[k]], ids=str
)
def test_on_a_gpu(kernel, dtype, R):
    size = {"H": 16, "P": 64, "G": 8, "N": 128, "N_a": 32, "R": R, "dtype": dtype, "device": "cuda"}
    for one in ({"S": 257, "state": 2}, {"B": 1, "S": 200, "state": 3, "ends": [0, 1, 1, 200]}):
        # the gradient of D is a few sums over all tokens: one draw's rounding says little of them
        draws = [inputs(**one, **size, seed=seed) for seed in range(4)]
        same_dtype = partial(reference.mamba3_scan, compute_dtype=dtype)
        agree(partial(mamba3_scan, kernel=kernel), reference.mamba3_scan, draws, same_dtype=same_dtype)
        assert all(t.is_cuda for t in flatten(mamba3_scan(**draws[0], kernel=kernel)))


@pytest.mark.gpu
def test_refused_on_a_gpu():
    with pytest.raises(NoKernel, match="cuda: x is torch.float32, but the CUDA kernel takes bfloat16 or float16"):
        mamba3_scan(**inputs(P=64, N=128, N_a=32, dtype=torch.float32, device="cuda"), kernel="cuda")
