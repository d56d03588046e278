"""Expanded multi-head latent attention on PyTorch's own attention kernels.

Each problem has one backend, decided by `backend` from shapes, dtype and device before the call, and pinned: where
PyTorch wouldn't take it after all, it raises; nothing falls back.

On CUDA, bf16 and fp16:
  - whole sequences: cuDNN, for head dims of q, k and of v up to 128 each, equal or not, and on Hopper for equal ones
    up to 256 and for 192/128. Else (other dims, a single token, torch.use_deterministic_algorithms): memory-efficient
    attention, slower, any dims.
  - packed sequences: FlashAttention-2 through torch.nn.attention.varlen, with the head dims padded to the larger one
    (128/64: half of the P·V product is spent on zeros). S stands in for the longest sequence, which the host doesn't
    know without a wait; the blocks past a sequence's end return at once.
On CUDA, fp32 and fp64: the math backend, in true fp32; it stores the S × S scores: for checks, not for speed.
On the CPU: what scaled_dot_product_attention takes there (fused for equal head dims, math otherwise).

Bits: the forward repeats, but the backward is not deterministic: PyTorch doesn't ask cuDNN for its deterministic
algorithm, and memory-efficient and FlashAttention-2 backwards may add with atomics. Gradients can differ in the last
bits from run to run, except under torch.use_deterministic_algorithms(True), with which PyTorch refuses cuDNN (so
memory-efficient attention runs) and asks the others for their slower deterministic backward.
The expanded key is stored: [B, S, H, Dn + Dr].
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from nam56r.kernels.mla.reference import visible
from nam56r.kernels.registry import Device, Spec

HALF = (torch.bfloat16, torch.float16)


def mla_attention(q, k_nope, k_rope, v, *, scale, causal=True, cu_seqlens=None, query_offset=0, return_lse=False):
    rope = k_rope.unsqueeze(2).expand(*k_nope.shape[:3], -1)
    k = torch.cat((k_nope, rope), -1)
    if not q.is_cuda:
        return _dense(q, k, v, scale, causal, cu_seqlens)
    if cu_seqlens is not None and q.dtype in HALF and q.shape[1]:
        return _packed(_aligned(q), k, _aligned(v), scale, causal, cu_seqlens)
    with sdpa_kernel(backend(Device.of(q.device), q, v)):
        return _dense(_aligned(q), k, _aligned(v), scale, causal, cu_seqlens)


def backend(device: Device, q: torch.Tensor | Spec, v: torch.Tensor | Spec) -> SDPBackend:
    """The backend for whole sequences on a CUDA device."""
    _, length, _, qk_dim = q.shape
    if q.dtype not in HALF or 0 in q.shape:
        return SDPBackend.MATH
    hopper = device.capability == (9, 0) and (qk_dim == v.shape[3] <= 256 or (qk_dim, v.shape[3]) == (192, 128))
    cudnn = hopper or max(qk_dim, v.shape[3]) <= 128
    if cudnn and length > 1 and not torch.are_deterministic_algorithms_enabled():
        return SDPBackend.CUDNN_ATTENTION
    return SDPBackend.EFFICIENT_ATTENTION


def _dense(q, k, v, scale, causal, cu_seqlens):
    mask = None if cu_seqlens is None else visible(q.shape[1], q.shape[1], causal, cu_seqlens, 0, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
    return out.transpose(1, 2)


def _packed(q, k, v, scale, causal, cu_seqlens):
    length, width = q.shape[1], max(q.shape[3], v.shape[3])
    q, k, v_wide = (pad(t[0], (0, width - t.shape[3])) for t in (q, k, v))
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v_wide, cu_seqlens, cu_seqlens, length, length, scale=scale, window_size=window)
    return out[None, ..., : v.shape[3]]


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """t itself where its rows start at 16 bytes, as the kernels ask; else a contiguous copy."""
    step = 16 // t.element_size()
    fits = t.stride(-1) == 1 and all(s % step == 0 for s in (*t.stride()[:-1], t.storage_offset()))
    return t if fits else t.contiguous()
