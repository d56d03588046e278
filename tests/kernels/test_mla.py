"""Multi-head latent attention: its definition checked by a second one, and every kernel against the definition."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from nam56r.kernels import extension
from nam56r.kernels.mla import cuda, latent_attention, library, merge_attention, mla_attention, reference
from nam56r.kernels.registry import DEVICES, NoKernel, Problem, Spec, candidates, select
from nam56r.kernels.testing import agree, outputs_and_gradients, replays, same_bits

# B, S, H, Dn, Dr, Dv
EDGES = [(2, 1, 2, 8, 8, 8), (1, 2, 1, 8, 8, 16), (2, 7, 3, 16, 8, 8), (1, 65, 2, 8, 8, 24), (1, 130, 2, 16, 16, 32)]
PACKED = [0, 5, 5, 6, 17, 17]


def tensors(B, S, H, Dn, Dr, Dv, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=(B, S, H, Dn + Dr), k_nope=(B, S, H, Dn), k_rope=(B, S, Dr), v=(B, S, H, Dv))
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


OPTIONS = {"causal": True, "cu_seqlens": None, "query_offset": 0, "return_lse": False}


def problem(device, dtype=torch.bfloat16, dims=(64, 64, 64), length=4096, **options):
    """dims: Dn, Dr and Dv of mla_attention, or L and Dr of latent_attention."""
    (nope, rope, *value), B, H = dims, 2, 32
    shapes = dict(q=(B, length, H, nope + rope))
    if value:
        shapes |= dict(k_nope=(B, length, H, nope), k_rope=(B, length, rope), v=(B, length, H, *value))
    else:
        shapes, options = shapes | dict(kv=(B, length, nope + rope)), dict(value_dim=nope) | options
    specs = {name: Spec(shape, dtype) for name, shape in shapes.items()}
    operator = "mla_attention" if value else "latent_attention"
    return Problem.of(operator, DEVICES[device], **specs, **{**OPTIONS, **options})


# what runs on a CPU without Triton's interpreter
EXPANDED = [k.name for k in candidates("mla_attention") if not k.reasons(problem("cpu"), by_name=False)]


def token_by_token(q, k, v, scale, causal, sequences):
    """The second definition: one token, one head at a time, over its own sequence's slice; k, v [B, S, H, D]."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for first, end in sequences:
            for t in range(first, end):
                seen = slice(first, t + 1 if causal else end)
                for h in range(q.shape[2]):
                    weight = torch.exp(scale * (k[b, seen, h] @ q[b, t, h]))
                    out[b, t, h] = weight @ v[b, seen, h] / weight.sum()
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_definitions_agree(causal, packed):
    x = tensors(1, 17, 2, 4, 4, 6)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    sequences = list(zip(PACKED, PACKED[1:])) if packed else [(0, 17)]
    options = dict(scale=0.3, causal=causal, cu_seqlens=cu_seqlens)
    k = torch.cat((x["k_nope"], x["k_rope"].unsqueeze(2).expand(-1, -1, 2, -1)), -1)
    expected = token_by_token(x["q"], k, x["v"], 0.3, causal, sequences)
    torch.testing.assert_close(mla_attention(**x, **options, kernel="reference"), expected)

    kv = x["k_rope"].repeat(1, 1, 2) * torch.arange(1, 9)
    key = kv.unsqueeze(2).expand(-1, -1, 2, -1)
    expected = token_by_token(x["q"], key, key[..., :5], 0.3, causal, sequences)
    torch.testing.assert_close(latent_attention(x["q"], kv, value_dim=5, **options), expected)


@pytest.mark.parametrize("kernel", EXPANDED)
@pytest.mark.parametrize("causal", [True, False])
def test_expanded_gradients(kernel, causal):
    x = tensors(1, 5, 2, 2, 2, 3)
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    for packed in (None, cu_seqlens):
        run = partial(mla_attention, scale=0.5, causal=causal, cu_seqlens=packed, kernel=kernel)
        assert torch.autograd.gradcheck(run, tuple(x.values()))


def test_latent_gradients():
    q = torch.randn(1, 5, 2, 5, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(1, 5, 5, dtype=torch.float64, requires_grad=True)
    for packed in (None, torch.tensor([0, 2, 2, 5], dtype=torch.int32)):
        run = partial(latent_attention, value_dim=3, scale=0.5, cu_seqlens=packed)
        assert torch.autograd.gradcheck(run, (q, kv))


@pytest.mark.parametrize("causal", [True, False])
def test_parts_of_the_keys_merge(causal):
    """Context parallel: queries from the middle, keys in parts, some of which a query doesn't see; gradients too."""
    x = tensors(2, 12, 3, 4, 2, 5)
    whole = partial(mla_attention, scale=0.4, causal=causal, return_lse=True, kernel="reference")

    def part(q, k_nope, k_rope, v):
        q = q[:, 4:11]
        keys = [(k_nope[:, a:b], k_rope[:, a:b], v[:, a:b], a) for a, b in ((0, 3), (3, 8), (8, 8), (8, 12))]
        return merge_attention(*zip(*(whole(q, *kv, query_offset=4 - first) for *kv, first in keys)))

    def expected(q, k_nope, k_rope, v):
        return whole(q[:, 4:11], k_nope, k_rope, v, query_offset=4)

    got, want = (outputs_and_gradients(f, x, None) for f in (part, expected))
    torch.testing.assert_close(got, want)
    assert all(torch.isfinite(t).all() for t in got[1].values())


def test_a_query_that_sees_nothing():
    q, kv = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 2, 6), (1, 5, 6)))
    run = partial(latent_attention, value_dim=4, scale=0.3, query_offset=-2, return_lse=True)
    out, lse = run(q, kv)
    assert not out[:, :2].any() and (lse[:, :2] == -torch.inf).all() and torch.isfinite(lse[:, 2:]).all()
    grads = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), (q, kv))
    assert all(torch.isfinite(t).all() for t in grads) and not grads[0][:, :2].any()
    out, lse = run(q, kv[:, :0])
    assert not out.any() and (lse == -torch.inf).all()
    out, lse = merge_attention(*zip(run(q, kv), run(q, kv)))
    grads = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), (q, kv))
    assert all(torch.isfinite(t).all() for t in grads) and not out[:, :2].any()


def test_absorbed_equals_expanded():
    """With k_nope = W_uk · latent and v = W_uv · latent both forms are one function, gradients of weights included."""
    B, S, H, Dn, Dr, Dv, L = 2, 9, 3, 4, 2, 5, 6
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, latent, k_rope = draw(B, S, H, Dn + Dr), draw(B, S, L), draw(B, S, Dr)
    up_k, up_v = draw(H, Dn, L), draw(H, Dv, L)
    k_nope, v = (torch.einsum("bsl,hdl->bshd", latent, up) for up in (up_k, up_v))
    expanded = mla_attention(q, k_nope, k_rope, v, scale=0.4)

    absorbed_q = torch.cat((torch.einsum("bshd,hdl->bshl", q[..., :Dn], up_k), q[..., Dn:]), -1)
    kv = torch.cat((latent, k_rope), -1)
    absorbed = torch.einsum("bshl,hdl->bshd", latent_attention(absorbed_q, kv, value_dim=L, scale=0.4), up_v)
    torch.testing.assert_close(absorbed, expanded)

    weight, leaves = torch.randn_like(expanded), (q, latent, k_rope, up_k, up_v)
    for a, b in zip(*(torch.autograd.grad(o, leaves, weight) for o in (absorbed, expanded))):
        torch.testing.assert_close(a, b)


def judge(kernel, x, **options):
    options = dict(scale=x["q"].shape[-1] ** -0.5, **options)
    coarse = partial(reference.mla_attention, compute_dtype=x["q"].dtype, **options)
    agree(
        partial(mla_attention, kernel=kernel, **options),
        partial(reference.mla_attention, **options),
        x,
        same_dtype=coarse,
    )


@pytest.mark.parametrize("kernel", EXPANDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_expanded_agrees(kernel, shape, dtype):
    judge(kernel, tensors(*shape, dtype))


@pytest.mark.parametrize("kernel", EXPANDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"causal": False}, {"cu_seqlens": PACKED}, {"cu_seqlens": PACKED, "causal": False}]
)
def test_expanded_agrees_with_options(kernel, dtype, options):
    if "cu_seqlens" in options:
        options = {**options, "cu_seqlens": torch.tensor(options["cu_seqlens"], dtype=torch.int32)}
    judge(kernel, tensors(1, 17, 2, 16, 8, 8, dtype), **options)


@pytest.mark.parametrize("kernel", EXPANDED)
def test_packed_equals_separate(kernel):
    x = tensors(1, 17, 2, 8, 8, 16)
    run = partial(mla_attention, scale=0.25, kernel=kernel)
    together = outputs_and_gradients(partial(run, cu_seqlens=torch.tensor(PACKED, dtype=torch.int32)), x, None)

    def apart(**x):
        pieces = [{n: t[:, a:b] for n, t in x.items()} for a, b in zip(PACKED, PACKED[1:]) if a < b]
        return torch.cat([run(**piece) for piece in pieces], 1)

    torch.testing.assert_close(together, outputs_and_gradients(apart, x, None))


@pytest.mark.parametrize("kernel", EXPANDED)
def test_non_contiguous(kernel):
    x = tensors(2, 6, 3, 8, 8, 8, torch.float32)
    expected = outputs_and_gradients(partial(mla_attention, scale=0.25, kernel=kernel), x, None)
    strided = {n: t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for n, t in x.items()}
    every_other = {n: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, t in x.items()}
    for same in (strided, every_other):
        assert not any(t.is_contiguous() for t in same.values())
        torch.testing.assert_close(
            outputs_and_gradients(partial(mla_attention, scale=0.25, kernel=kernel), same, None), expected
        )


@pytest.mark.parametrize("kernel", EXPANDED)
def test_same_bits_on_the_cpu(kernel):
    same_bits(partial(mla_attention, scale=0.25, kernel=kernel), tensors(2, 33, 2, 8, 8, 8, torch.bfloat16))


@pytest.mark.parametrize("kernel", EXPANDED)
@pytest.mark.parametrize("empty", [(0, 4), (2, 0)], ids=["B=0", "S=0"])
def test_nothing_in_nothing_out(kernel, empty):
    x = tensors(*empty, 2, 8, 8, 8, torch.float32)
    out = mla_attention(**x, scale=0.25, kernel=kernel)
    assert out.shape == (*empty, 2, 8)
    assert torch.autograd.grad(out.sum(), x["q"])[0].shape == x["q"].shape
    assert latent_attention(x["q"], x["q"][:, :, 0], value_dim=8, scale=0.25).shape == (*empty, 2, 8)


@pytest.fixture
def built(monkeypatch):
    """As with an extension for the H200."""
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "archs", lambda: ("90a",))
    monkeypatch.setattr(cuda, "REGISTERED", True)
    select.cache_clear()
    yield
    select.cache_clear()


def test_what_runs_on_a_cpu():
    assert EXPANDED == ["torch", "reference"]
    assert select(problem("cpu")).name == "torch"
    assert select(problem("cpu", dims=(64, 64))).name == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["h100", "h200"])
def test_selected_on_hopper(built, device, dtype, monkeypatch):
    packed = {"cu_seqlens": Spec((5,), torch.int32)}
    others = {"query_offset": 7, "return_lse": True}
    for dims, without in (((64, 64), "triton"), ((64, 64, 64), "torch"), ((128, 64, 128), "torch")):
        for options in ({}, packed, others):
            assert select(problem(device, dtype, dims, **options)).name == "cuda"
        monkeypatch.setattr(cuda, "REGISTERED", False)
        select.cache_clear()
        assert select(problem(device, dtype, dims)).name == without
        assert select(problem(device, dtype, dims, **others)).name == "triton"
        monkeypatch.setattr(cuda, "REGISTERED", True)
        select.cache_clear()


def test_selected_where_the_cuda_kernel_refuses():
    """Whether the extension is built or not."""
    packed = Spec((5,), torch.int32)
    assert select(problem("a100")).name == "torch"
    assert select(problem("a100", dims=(64, 64))).name == "triton"
    assert select(problem("h200", torch.float32)).name == "torch"
    for dims, options, why in (
        ((60, 40, 60), {}, "head dims are 100 .* 60 .* multiples of 8"),
        ((512, 64, 512), {"cu_seqlens": packed}, "up to head dim 256, not 576"),
    ):
        asked = problem("h200", dims=dims, **options)
        assert select(asked).name == "triton"
        with pytest.raises(NoKernel, match=why):
            select(asked, "torch")
    asked = problem("h200", torch.float64, (64, 64))
    with pytest.raises(NoKernel, match="float64.*development kernel.*runs only when asked for by name"):
        select(asked)
    assert select(asked, "reference").role == "development"
    assert [k.name for k in candidates("latent_attention")] == ["cuda", "triton", "reference"]


ABSORBED = "L + Dr = {}, but the CUDA kernel takes 64 + 64"
SPLIT = "Dn + Dr / Dv = {}, but the CUDA kernel takes 64 + 64 / 64, 128 + 64 / 128"


@pytest.mark.parametrize(
    "asked, why",
    [
        (problem("h200"), []),
        (problem("h100", torch.float16, (64, 64)), []),
        (problem("cpu"), ["a CUDA kernel, but the device is cpu"]),
        (problem("a100"), ["a100 is sm_80, but the CUDA kernel takes sm_90 (H100, H200)"]),
        (problem("b200", dims=(64, 64)), ["b200 is sm_100, but the CUDA kernel takes sm_90 (H100, H200)"]),
        (problem("h200", torch.float32), ["q is torch.float32, but the CUDA kernel takes bfloat16 or float16"]),
        (problem("h200", dims=(512, 64)), [ABSORBED.format("512 + 64")]),
        (problem("h200", dims=(64, 32)), [ABSORBED.format("64 + 32")]),
        (problem("h200", dims=(128, 64, 64)), [SPLIT.format("128 + 64 / 64")]),
        (
            problem("a100", torch.float64, (192, 64, 128)),
            ["a100 is sm_80", "q is torch.float64", SPLIT.format("192 + 64 / 128")],
        ),
    ],
)
def test_the_cuda_kernel_refuses(built, asked, why):
    """Every reason at once."""
    reasons = candidates(asked.operator)[0].refuses(asked)
    assert len(reasons) == len(why) and all(map(str.startswith, reasons, why))


@pytest.mark.parametrize("dims", [(64, 64), (64, 64, 64)])
def test_the_cuda_kernel_refuses_another_extension(built, dims, monkeypatch):
    asked = problem("h200", dims=dims)
    refuses = candidates(asked.operator)[0].refuses
    monkeypatch.setattr(extension, "archs", lambda: ("80", "100"))
    assert refuses(asked) == (
        "CUDA extension built for sm_80, sm_100, but the CUDA kernel is sm_90a: install with NAM56R_CUDA_ARCHS=90a",
    )
    monkeypatch.setattr(cuda, "REGISTERED", False)
    older = "CUDA extension built from older sources, without attention: install the package again"
    assert refuses(asked) == (older,)
    monkeypatch.setattr(extension, "load", lambda: "not built: no nvcc")
    assert refuses(asked) == ("CUDA extension not built: no nvcc",)


@pytest.mark.parametrize(
    "device, dims, length, dtype, expected",
    [
        ("h200", (64, 64, 64), 4096, torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        ("a100", (64, 64, 64), 4096, torch.float16, SDPBackend.CUDNN_ATTENTION),
        ("h200", (128, 64, 128), 4096, torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        ("b200", (128, 64, 128), 4096, torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION),
        ("h200", (96, 64, 64), 4096, torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION),
        ("h200", (192, 64, 256), 4096, torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
        ("h200", (64, 64, 64), 1, torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION),
        ("h200", (64, 64, 64), 4096, torch.float32, SDPBackend.MATH),
    ],
)
def test_backend_is_the_stated_one(device, dims, length, dtype, expected):
    asked = problem(device, dtype, dims, length)
    assert library.backend(asked.device, asked["q"], asked["v"]) is expected


def test_refusals_name_the_argument():
    x = {n: t.detach() for n, t in tensors(2, 4, 2, 8, 8, 8, torch.float32).items()}
    good = partial(mla_attention, **x, scale=0.25)
    with pytest.raises(
        ValueError, match=r"mla_attention: q is \[2, 4, 2, 15\], but must be \[B=2, S, H=2, Dn\+Dr=16\]"
    ):
        good(q=x["q"][..., :-1])
    with pytest.raises(TypeError, match="v is bfloat16, but must be float32"):
        good(v=x["v"].bfloat16())
    with pytest.raises(TypeError, match="scale is Tensor, but must be a number"):
        good(scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match="causal is None, but must be one of True, False"):
        good(causal=None)
    with pytest.raises(ValueError, match="B must be 1, not 2"):
        good(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    for scale in (0, -0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"scale is {scale}, but must be positive and finite"):
            good(scale=scale)
    with pytest.raises(ValueError, match="no kernel 'nope': one of cuda, torch, triton, reference"):
        good(kernel="nope")
    with pytest.raises(ValueError, match="latent_attention: value_dim is 17, but must be from 1 to L.Dr = 16"):
        latent_attention(x["q"], x["q"][:, :, 0], value_dim=17, scale=0.25)
    with pytest.raises(ValueError, match=r"latent_attention: kv is \[2, 4, 8\]"):
        latent_attention(x["q"], x["v"][:, :, 0], value_dim=4, scale=0.25)
    with pytest.raises(TypeError, match="query_offset is 1.0, but must be a whole number"):
        good(query_offset=1.0)
    with pytest.raises(ValueError, match="query_offset is 1073741824, but must lie within"):
        good(query_offset=2**30)
    packed = {name: t[:1] for name, t in x.items()} | {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}
    with pytest.raises(ValueError, match="T = 4 must be S = 4 and query_offset 0, not 2"):
        good(**packed, query_offset=2)
    with pytest.raises(ValueError, match="no kernel .*torch: .*returns no logsumexp.*as many keys as queries"):
        good(query_offset=2, return_lse=True, kernel="torch")
    with pytest.raises(ValueError, match="merge_attention: 1 outs and 0 lses"):
        merge_attention([x["q"]], [])


def test_compiles():
    x = tensors(1, 6, 2, 8, 8, 8, torch.float32)
    run = partial(library.mla_attention, scale=0.25)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, x, None), outputs_and_gradients(run, x, None))


GPU_EDGES = [(2, 1, 2, 64, 64, 64), (1, 2, 1, 64, 64, 64), (2, 130, 3, 64, 64, 64), (1, 977, 4, 128, 64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*GPU_EDGES, (1, 300, 2, 96, 64, 64)], ids=str)
def test_gpu_agrees(shape, dtype):
    judge("torch", tensors(*shape, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_agrees_packed(dtype, causal):
    cu_seqlens = torch.tensor([0, 1, 1, 130, 200, 333], dtype=torch.int32, device="cuda")
    judge("torch", tensors(1, 333, 2, 64, 64, 64, dtype, "cuda"), cu_seqlens=cu_seqlens, causal=causal)


@pytest.mark.gpu
def test_gpu_takes_misaligned_and_strided():
    x = tensors(1, 130, 2, 64, 64, 64, torch.bfloat16, "cuda")
    wide = {n: torch.nn.functional.pad(t.detach(), (1, 2))[..., 1:-2].requires_grad_() for n, t in x.items()}
    every_other = {n: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, t in x.items()}
    for same in (wide, every_other):
        judge("torch", same)


@pytest.mark.gpu
def test_gpu_runs_cudnn():
    x = tensors(1, 256, 4, 64, 64, 64, torch.bfloat16, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        mla_attention(**x, scale=0.1, kernel="torch").sum().backward()
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    assert sum("cudnn" in name.lower() and "sdpa" in name.lower() for name in names) >= 2, names  # forward, backward


@pytest.mark.gpu
def test_gpu_repeats_where_determinism_is_asked_for():
    x = tensors(2, 300, 4, 64, 64, 64, torch.bfloat16, "cuda")
    run = partial(mla_attention, scale=0.1, kernel="torch")
    with torch.no_grad():
        same_bits(run, {n: t.detach() for n, t in x.items()})
    torch.use_deterministic_algorithms(True)
    try:
        same_bits(run, x)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_graph_replays(packed):
    """One block of queries and keys (S = 64), where the sums have one order, so that bits can be compared."""
    cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32, device="cuda") if packed else None
    run = partial(mla_attention, scale=0.1, cu_seqlens=cu_seqlens, kernel="torch")
    replays(run, lambda seed: tensors(1, 64, 2, 64, 64, 64, torch.bfloat16, "cuda", seed))
