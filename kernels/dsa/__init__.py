"""DeepSeek sparse attention (DeepSeek-V3.2-Exp report, section 2.1): lightning indexer, top-k, attention, KL loss.

Index scores are I[t, s] = Σ_h w_h[t] · relu(q_h[t] · k[s]), with no factor of their own. Callers that follow
DeepSeek and Megatron put Hi ** -0.5 · Di ** -0.5 into the weights.
"""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes
from nam56r.kernels.dsa import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def index_top_k(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    top_k: int,
    *,
    cu_seqlens: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """The top_k keys s ≤ t of every query t by index score, the smaller index first where scores are equal.

    q           [B, S, Hi, Di]  bf16, fp16, fp32 or fp64
    k           [B, S, Di]      the dtype of q
    weights     [B, S, Hi]      any of those dtypes
    top_k       at least 1; may exceed S
    cu_seqlens  [n + 1] int32, sequences packed into one row (B = 1); a query's keys stay within its sequence
    kernel      a name from the registry; None takes the first that accepts the problem. "cuda_fp8" rounds the rows of
                q and k to e4m3 first, each with a scale of its own, and is never taken without being named
    Returns indices [B, S, top_k] int32: the chosen positions in S (with cu_seqlens too: in the packed row, not in the
    sequence), ascending, then -1 where there are no more keys. A key whose score is NaN is never chosen, and sets a flag
    on the device (`status.nan_scores`); -inf is a score like others, the lowest. No gradient.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel, listing
    each candidate's reasons, when none can run it.
    """
    sizes = Shapes("index_top_k")
    sizes.bind("q", q, "B S Hi Di", FLOATS)
    sizes.bind("k", k, "B S Di", (q.dtype,))
    sizes.bind("weights", weights, "B S Hi", FLOATS)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"index_top_k: top_k is {top_k!r}, but must be a whole number of at least 1")
    sizes.packed(cu_seqlens)
    problem = Problem.of("index_top_k", q=q, k=k, weights=weights, top_k=top_k, cu_seqlens=cu_seqlens)
    return select(problem, kernel).run(q, k, weights, top_k, cu_seqlens=cu_seqlens)


def sparse_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    kernel: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA over the selected keys: out = softmax(scale · q kv_sᵀ) kv_s[..., :value_dim], s in indices[t].

    q          [B, S, H, L + Dr]  bf16, fp16, fp32 or fp64; the nope part already times W_uk, rope last
    kv         [B, S, L + Dr]     the dtype of q; [latent | rope key], shared by all heads
    indices    [B, S, K] int32    positions in S, each at most once in a row; -1 is skipped. They are taken as they
                                  are: causality and sequence borders are `index_top_k`'s
    value_dim  how many leading features of kv are the value: L
    scale      factor of the scores, before the softmax
    Returns out [B, S, H, value_dim] in the dtype of q, with gradients to q and kv, and lse [B, S, H] in fp32 (fp64
    for fp64 inputs): the log of the softmax's denominator, without gradient. A query without keys gives out 0,
    lse -inf and gradient 0. Raises as `index_top_k`; indices out of range are seen on the CPU only.
    """
    sizes = Shapes("sparse_latent_attention")
    _attention(sizes, q, kv, indices, scale)
    if value_dim not in range(1, sizes["L+Dr"] + 1):
        what = f"must be from 1 to L+Dr = {sizes['L+Dr']}"
        raise ValueError(f"sparse_latent_attention: value_dim is {value_dim!r}, but {what}")
    problem = Problem.of("sparse_latent_attention", q=q, kv=kv, indices=indices, value_dim=value_dim)
    return select(problem, kernel).run(q, kv, indices, value_dim=value_dim, scale=scale)


def indexer_kl_loss(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor | None,
    lse: torch.Tensor | None,
    *,
    scale: float,
    kernel: str | None = None,
) -> torch.Tensor:
    """The indexer's loss for every query: KL(target ‖ softmax(I)) over its keys.

    The target is the attention's probability of each key, exp(scale · q kvᵀ − lse), summed over the heads and divided
    by its own sum; it has no gradient. The keys are the selected ones (sparse stage) or, with indices None, all
    s ≤ t (dense warm-up; rows are then whole sequences, packed ones can't be told apart).

    index_q        [B, S, Hi, Di]     bf16, fp16, fp32 or fp64, as in `index_top_k`
    index_k        [B, S, Di]         the dtype of index_q
    index_weights  [B, S, Hi]         any of those dtypes
    q              [B, S, H, L + Dr]  any of those dtypes; all heads of the layer: the sum over heads is inside
    kv             [B, S, L + Dr]     the dtype of q
    indices        [B, S, K] int32    or None, as above
    lse            [B, S, H]          over the same keys, as `sparse_latent_attention` gives it; None computes it
    scale          factor of the attention scores
    Returns loss [B, S] in fp32 (fp64 for fp64 inputs), 0 for a query without keys. Gradients to index_q, index_k
    and index_weights only. Raises as `sparse_latent_attention`.

    Megatron's loss is its mean over all queries (the sum, with calculate_per_token_loss) times
    dsa_indexer_loss_coeff; Megatron clamps the target at 1e-10 inside the logarithm, which moves it by less than
    1e-10 a key.
    """
    sizes = Shapes("indexer_kl_loss")
    sizes.bind("index_q", index_q, "B S Hi Di", FLOATS)
    sizes.bind("index_k", index_k, "B S Di", (index_q.dtype,))
    sizes.bind("index_weights", index_weights, "B S Hi", FLOATS)
    _attention(sizes, q, kv, indices, scale)
    sizes.bind("lse", lse, "B S H", (torch.float32, torch.float64), optional=True)
    arguments = dict(index_q=index_q, index_k=index_k, index_weights=index_weights)
    arguments |= dict(q=q, kv=kv, indices=indices, lse=lse)
    return select(Problem.of("indexer_kl_loss", **arguments), kernel).run(**arguments, scale=scale)


def _attention(sizes: Shapes, q, kv, indices, scale) -> None:
    sizes.bind("q", q, "B S H L+Dr", FLOATS)
    sizes.bind("kv", kv, "B S L+Dr", (q.dtype,))
    sizes.bind("indices", indices, "B S K", (torch.int32,), optional=sizes.operator == "indexer_kl_loss")
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{sizes.operator}: scale is {type(scale).__name__}, but must be a number")
    if indices is not None and indices.device.type == "cpu" and indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < -1 or high >= sizes["S"]:
            what = f"must be from 0 to {sizes['S'] - 1}, or -1 for none"
            raise ValueError(f"{sizes.operator}: indices go from {low} to {high}, but {what}")
