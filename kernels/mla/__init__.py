"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the expanded and the absorbed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.mla import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.mla.rope import Yarn, mla_latents, mla_queries, positions_of, rope_tables  # noqa: F401
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
    query_offset: int = 0,
    return_lse: bool = False,
    kernel: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Expanded MLA: out = softmax(scale · q [k_nope | k_rope]ᵀ) v, one rope key for all heads; RoPE is already applied.

    q             [B, S, H, Dn + Dr]  bf16, fp16, fp32 or fp64; nope first, rope last
    k_nope        [B, T, H, Dn]       the dtype of q; T keys, usually S
    k_rope        [B, T, Dr]          the dtype of q
    v             [B, T, H, Dv]       the dtype of q; Dv may differ from Dn + Dr
    scale         positive factor of the scores, before the softmax (usually (Dn + Dr) ** -0.5)
    causal        a token sees itself and what comes before it in its sequence; else its whole sequence
    cu_seqlens    [n + 1] int32, sequences packed into one row (B = 1, S = T); they don't see each other
    query_offset  the first query's place among the keys (context parallel): query s sees the keys t ≤ query_offset + s;
                  may be negative
    return_lse    also give the logarithm of the softmax's denominator, for `merge_attention` or a loss
    kernel        a name from the registry; None takes the first that accepts the problem
    Returns out [B, S, H, Dv] in the dtype of q, and with return_lse lse [B, S, H] in fp32 (fp64 for fp64): natural
    logarithms. A query that sees no key gives 0 and -inf. Gradients to q, k_nope, k_rope and v, through lse too.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel, listing
    each candidate's reasons, when none can run it.
    """
    sizes = Shapes("mla_attention")
    sizes.bind("k_nope", k_nope, "B T H Dn", FLOATS)
    sizes.bind("k_rope", k_rope, "B T Dr", (k_nope.dtype,))
    sizes.sizes["Dn+Dr"] = sizes["Dn"] + sizes["Dr"]
    sizes.bind("q", q, "B S H Dn+Dr", (k_nope.dtype,))
    sizes.bind("v", v, "B T H Dv", (k_nope.dtype,))
    options = _options(sizes, scale, causal, cu_seqlens, query_offset, return_lse)
    problem = Problem.of("mla_attention", q=q, k_nope=k_nope, k_rope=k_rope, v=v, **options)
    return select(problem, kernel).run(q, k_nope, k_rope, v, scale=scale, **options)


def latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    causal: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    query_offset: int = 0,
    return_lse: bool = False,
    kernel: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA, which is multi-query attention: out = softmax(scale · q kvᵀ) kv[..., :value_dim].

    q           [B, S, H, L + Dr]  bf16, fp16, fp32 or fp64; the nope part already times W_uk, rope last
    kv          [B, T, L + Dr]     the dtype of q; [latent | rope key], shared by all heads
    value_dim   how many leading features of kv are the value: L
    The rest as in `mla_attention`; scale stays that of the expanded head dim.
    Returns out [B, S, H, value_dim] in the dtype of q: the latent output, still to be multiplied by W_uv; and lse as
    there. Gradients to q and kv (through key and value). Raises as `mla_attention`.
    """
    sizes = Shapes("latent_attention")
    sizes.bind("q", q, "B S H L+Dr", FLOATS)
    sizes.bind("kv", kv, "B T L+Dr", (q.dtype,))
    if value_dim not in range(1, sizes["L+Dr"] + 1):
        raise ValueError(f"latent_attention: value_dim is {value_dim!r}, but must be from 1 to L+Dr = {sizes['L+Dr']}")
    options = _options(sizes, scale, causal, cu_seqlens, query_offset, return_lse)
    problem = Problem.of("latent_attention", q=q, kv=kv, value_dim=value_dim, **options)
    return select(problem, kernel).run(q, kv, value_dim=value_dim, scale=scale, **options)


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention over all keys gives, from its results over parts of them: out = Σ exp(lse_i − lse) out_i.

    outs  each [B, S, H, D] in one dtype; lses  each [B, S, H], as `latent_attention` and `mla_attention` return them
    Returns (out, lse) in their dtypes, with gradients to all; 0 and -inf where no part saw a key.
    Raises ValueError when the lists are empty or differ in length, or shapes disagree.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attention: {len(outs)} outs and {len(lses)} lses, but must be equally many, from 1")
    sizes = Shapes("merge_attention")
    for i, (out, lse) in enumerate(zip(outs, lses)):
        sizes.bind(f"outs[{i}]", out, "B S H D", (outs[0].dtype,))
        sizes.bind(f"lses[{i}]", lse, "B S H", (lses[0].dtype,))
    parts = torch.stack(tuple(lses))
    lse = parts.logsumexp(0)
    weights = (parts - lse.masked_fill(lse == -torch.inf, 0)).exp().unsqueeze(-1)
    out = sum(weight * out.to(lse.dtype) for weight, out in zip(weights, outs))
    return out.to(outs[0].dtype), lse


def _options(
    sizes: Shapes,
    scale: float,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
    query_offset: int,
    return_lse: bool,
) -> dict[str, Any]:
    """The options that both forms share, checked."""
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{sizes.operator}: scale is {type(scale).__name__}, but must be a number")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{sizes.operator}: scale is {scale}, but must be positive and finite")
    one_of(sizes.operator, "causal", causal, (True, False))
    one_of(sizes.operator, "return_lse", return_lse, (True, False))
    if isinstance(query_offset, bool) or not isinstance(query_offset, int):
        raise TypeError(f"{sizes.operator}: query_offset is {query_offset!r}, but must be a whole number")
    if abs(query_offset) >= 2**30:
        raise ValueError(f"{sizes.operator}: query_offset is {query_offset}, but must lie within ±2^30")
    sizes.packed(cu_seqlens)
    if cu_seqlens is not None and (sizes["T"] != sizes["S"] or query_offset):
        raise ValueError(
            f"{sizes.operator}: cu_seqlens packs queries and keys alike, so T = {sizes['T']} must be S = {sizes['S']} "
            f"and query_offset 0, not {query_offset}"
        )
    return dict(causal=causal, cu_seqlens=cu_seqlens, query_offset=query_offset, return_lse=return_lse)
