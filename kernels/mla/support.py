"""The kernels of `mla_attention` and `latent_attention`, best first."""

from __future__ import annotations

from nam56r.kernels import extension
from nam56r.kernels.mla import cuda, library, reference, rope_reference, rope_triton, triton
from nam56r.kernels.registry import Kernel, Problem


def _library_refuses(problem: Problem) -> tuple[str, ...]:
    q, v, device = problem["q"], problem["v"], problem.device
    reasons = []
    if problem["return_lse"]:
        reasons.append("PyTorch's attention returns no logsumexp")
    if problem["query_offset"] or q.shape[1] != v.shape[1]:
        reasons.append("it takes as many keys as queries, and no query_offset")
    if device.type == "cpu" or q.dtype not in library.HALF:
        return tuple(reasons)
    if device.capability < (8, 0):
        reasons.append(f"PyTorch's attention kernels need compute capability 8.0, not {device.capability}")
    if q.shape[3] % 8 or v.shape[3] % 8:
        reasons.append(f"head dims are {q.shape[3]} (q, k) and {v.shape[3]} (v), but must be multiples of 8")
    if problem["cu_seqlens"] is not None and max(q.shape[3], v.shape[3]) > 256:
        reasons.append(
            f"packed sequences run on FlashAttention-2, up to head dim 256, not {max(q.shape[3], v.shape[3])}"
        )
    return tuple(reasons)


def _cuda_refuses(problem: Problem) -> tuple[str, ...]:
    missing = extension.missing(problem)
    if missing:
        return missing
    if not cuda.REGISTERED:
        return ("CUDA extension built from older sources, without attention: install the package again",)
    q, reasons = problem["q"], extension.hopper_only(problem)
    if q.dtype not in cuda.DTYPES:
        reasons.append(f"q is {q.dtype}, but the CUDA kernel takes bfloat16 or float16")
    dims: tuple[int, ...]
    taken: tuple[tuple[int, ...], ...]
    if problem.operator == "latent_attention":
        latent = problem["value_dim"]
        dims, taken, names = (latent, q.shape[-1] - latent), cuda.ABSORBED, "L + Dr"
        rows, keys = ("S · H", q.shape[1] * q.shape[2]), problem["kv"].shape[1]
    else:
        dims = tuple(problem[name].shape[-1] for name in ("k_nope", "k_rope", "v"))
        taken, names = cuda.EXPANDED, "Dn + Dr / Dv"
        rows, keys = ("S", q.shape[1]), problem["v"].shape[1]
    for name, count in (rows, ("T", keys)):
        if count >= cuda.MOST:
            reasons.append(f"{name} = {count}, but the CUDA kernel counts up to {cuda.MOST - 1}")
    if dims not in taken:
        shown = ", ".join(_dims(one) for one in taken)
        reasons.append(f"{names} = {_dims(dims)}, but the CUDA kernel takes {shown}")
    return tuple(reasons)


def _dims(dims: tuple[int, ...]) -> str:
    return " + ".join(map(str, dims[:2])) + "".join(f" / {d}" for d in dims[2:])


KERNELS = (
    Kernel("mla_attention", "cuda", cuda.mla_attention, _cuda_refuses),
    Kernel("mla_attention", "torch", library.mla_attention, _library_refuses),
    Kernel("mla_attention", "triton", triton.mla_attention, triton.mla_refuses),
    Kernel("mla_attention", "reference", reference.mla_attention, role="development"),
    Kernel("latent_attention", "cuda", cuda.latent_attention, _cuda_refuses),
    Kernel("latent_attention", "triton", triton.latent_attention, triton.latent_refuses),
    Kernel("latent_attention", "reference", reference.latent_attention, role="development"),
    Kernel("mla_queries", "triton", rope_triton.mla_queries, rope_triton.queries_refuses),
    Kernel("mla_queries", "reference", rope_reference.mla_queries, role="development"),
    Kernel("mla_latents", "triton", rope_triton.mla_latents, rope_triton.latents_refuses),
    Kernel("mla_latents", "reference", rope_reference.mla_latents, role="development"),
)
