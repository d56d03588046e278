"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the expanded and the absorbed form."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.mla import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def mla_attention(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Expanded MLA: out = softmax(scale · q [k_nope | k_rope]ᵀ) v, one rope key for all heads; RoPE is already applied.

    q           [B, S, H, Dn + Dr]  bf16, fp16, fp32 or fp64; nope first, rope last
    k_nope      [B, S, H, Dn]       the dtype of q
    k_rope      [B, S, Dr]          the dtype of q
    v           [B, S, H, Dv]       the dtype of q; Dv may differ from Dn + Dr
    scale       factor of the scores, before the softmax (usually (Dn + Dr) ** -0.5)
    causal      a token sees itself and what comes before it in its sequence; else its whole sequence
    cu_seqlens  [n + 1] int32, sequences packed into one row (B = 1); they don't see each other
    kernel      a name from the registry; None takes the first that accepts the problem
    Returns out [B, S, H, Dv] in the dtype of q. Gradients to q, k_nope, k_rope and v.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel, listing
    each candidate's reasons, when none can run it.
    """
    sizes = Shapes("mla_attention")
    sizes.bind("k_nope", k_nope, "B S H Dn", FLOATS)
    sizes.bind("k_rope", k_rope, "B S Dr", (k_nope.dtype,))
    sizes.sizes["Dn+Dr"] = sizes["Dn"] + sizes["Dr"]
    sizes.bind("q", q, "B S H Dn+Dr", (k_nope.dtype,))
    sizes.bind("v", v, "B S H Dv", (k_nope.dtype,))
    _options(sizes, scale, causal, cu_seqlens)
    problem = Problem.of("mla_attention", q=q, k_nope=k_nope, k_rope=k_rope, v=v, causal=causal, cu_seqlens=cu_seqlens)
    run = select(problem, kernel).run
    return run(q, k_nope, k_rope, v, scale=scale, causal=causal, cu_seqlens=cu_seqlens)


def latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    causal: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Absorbed MLA, which is multi-query attention: out = softmax(scale · q kvᵀ) kv[..., :value_dim].

    q           [B, S, H, L + Dr]  bf16, fp16, fp32 or fp64; the nope part already times W_uk, rope last
    kv          [B, S, L + Dr]     the dtype of q; [latent | rope key], shared by all heads
    value_dim   how many leading features of kv are the value: L
    scale, causal, cu_seqlens, kernel   as in `mla_attention`; scale stays that of the expanded head dim
    Returns out [B, S, H, value_dim] in the dtype of q: the latent output, still to be multiplied by W_uv.
    Gradients to q and kv (through key and value). Raises as `mla_attention`.
    """
    sizes = Shapes("latent_attention")
    sizes.bind("q", q, "B S H L+Dr", FLOATS)
    sizes.bind("kv", kv, "B S L+Dr", (q.dtype,))
    if value_dim not in range(1, sizes["L+Dr"] + 1):
        raise ValueError(f"latent_attention: value_dim is {value_dim!r}, but must be from 1 to L+Dr = {sizes['L+Dr']}")
    _options(sizes, scale, causal, cu_seqlens)
    problem = Problem.of("latent_attention", q=q, kv=kv, value_dim=value_dim, causal=causal, cu_seqlens=cu_seqlens)
    run = select(problem, kernel).run
    return run(q, kv, value_dim=value_dim, scale=scale, causal=causal, cu_seqlens=cu_seqlens)


def _options(sizes: Shapes, scale: float, causal: bool, cu_seqlens: torch.Tensor | None) -> None:
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{sizes.operator}: scale is {type(scale).__name__}, but must be a number")
    one_of(sizes.operator, "causal", causal, (True, False))
    sizes.packed(cu_seqlens)
