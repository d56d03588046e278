"""The kernels of `mla_attention` and `latent_attention`, best first."""

from __future__ import annotations

from nam56r.kernels.mla import library, reference
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


KERNELS = (
    Kernel("mla_attention", "torch", library.mla_attention, _library_refuses),
    Kernel("mla_attention", "reference", reference.mla_attention, role="development"),
    Kernel("latent_attention", "reference", reference.latent_attention, role="development"),
)
