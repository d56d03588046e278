"""What comes before MLA's attention, each one pass: RoPE of queries and keys, absorption, down-projection norms.

RoPE is RoFormer's (arXiv 2104.09864), with YaRN's scaling (arXiv 2309.00071) as Megatron-core defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.mla import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select

_TABLE = (torch.float32,)


@dataclass(frozen=True)
class Yarn:
    """YaRN's scaling, in the names and with the defaults of Megatron's `YarnRotaryEmbedding`.

    Frequencies that turn more than beta_fast times in original_max_position_embeddings tokens stay, those that turn
    less than beta_slow times are divided by scaling_factor, those between are mixed. cos and sin are multiplied by
    `concentration`. Raises ValueError for a scaling_factor or a length that isn't positive.
    """

    scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    correction_range_round_to_int: bool = True

    def __post_init__(self):
        names = ("scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        wrong = [f"{name} is {getattr(self, name)!r}" for name in names if not getattr(self, name) > 0]
        if wrong:
            raise ValueError(f"Yarn: {', '.join(wrong)}, but must be positive")

    @property
    def concentration(self) -> float:
        """The factor of cos and sin."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """The factor that Megatron's MLA puts on the softmax scale, beside head_dim ** -0.5."""
        return self._mscale(self.mscale_all_dim) ** 2

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.scaling_factor <= 1 else 0.1 * mscale * math.log(self.scaling_factor) + 1.0

    def kept(self, dim: int, theta: float) -> torch.Tensor:
        """How much of each frequency stays unscaled: [dim / 2] fp64, from 1 (fast) to 0 (slow)."""

        def turning(rotations: float) -> float:  # the place, among dim, that turns so often in the original length
            return (
                dim * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi)) / 2 / math.log(theta)
            )

        low, high = turning(self.beta_fast), turning(self.beta_slow)
        if self.correction_range_round_to_int:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        place = torch.arange(dim // 2, dtype=torch.float64)
        return 1 - ((place - low) / (high - low or 0.001)).clamp(0, 1)


def rope_tables(
    length: int,
    dim: int,
    theta: float,
    *,
    yarn: Yarn | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · theta^(−2i / dim), each [length, dim / 2] fp32; angles are fp64.

    yarn's concentration is multiplied into both. Megatron's own angles are fp32, so that theirs at position p are off
    by about p · 2^-24. Raises ValueError for an odd dim, a length below 0, or a theta not above 1.
    """
    wrong = []
    if dim < 2 or dim % 2:
        wrong.append(f"dim is {dim!r}, but must be even, from 2")
    if length < 0:
        wrong.append(f"length is {length!r}, but must be at least 0")
    if not theta > 1:
        wrong.append(f"theta is {theta!r}, but must be above 1")
    if wrong:
        raise ValueError(f"rope_tables: {'; '.join(wrong)}")
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is not None:
        kept = yarn.kept(dim, theta)
        frequency *= kept + (1 - kept) / yarn.scaling_factor
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency.to(device))
    factor = 1.0 if yarn is None else yarn.concentration
    return (factor * angle.cos()).float(), (factor * angle.sin()).float()


def positions_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Each token's place in its own sequence: [length] int32, on the device of cu_seqlens, without reading it there.

    cu_seqlens  [n + 1] int32: bounds of the sequences that are packed into one row of length tokens
    Raises ValueError or TypeError when cu_seqlens isn't that (its values are checked on a CPU only).
    """
    Shapes("positions_of", B=1, S=length).packed(cu_seqlens)
    token = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], out_int32=True, right=True)
    return token - cu_seqlens.index_select(0, sequence)


def mla_queries(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = True,
    kernel: str | None = None,
) -> torch.Tensor:
    """RoPE of the queries' last Dr features, and with up the absorption of the key up-projection by the others.

    q            [B, S, H, Dn + Dr]  bf16, fp16, fp32 or fp64; nope first, rope last; any strides
    cos, sin     [P, Dr / 2]         fp32, from `rope_tables`; they get no gradient
    up           [H, Dn, L]          the dtype of q; q_nope becomes q_nope · up[h]. None: it is copied
    positions    [S] int32, each token's row of the tables, as from `positions_of`; None is 0 … S − 1, with P ≥ S
    interleaved  pairs that turn are the features (2i, 2i + 1), as in DeepSeek's models; False: (i, i + Dr / 2)
    kernel       a name from the registry; None takes the first that accepts the problem

    Returns [B, S, H, Dn + Dr], with up [B, S, H, L + Dr], in q's dtype, contiguous. The rope part is
    [x0 cos − x1 sin | x1 cos + x0 sin], all pairs' first elements before their second ones, for either order of the
    input (Megatron's mla_rotary_interleaved). Scores don't change by that, as `mla_latents` permutes the keys alike.
    Gradients to q and up. A position outside the tables raises ValueError on a CPU; the kernel `triton`, which can't
    read it there, makes its token's rope part NaN.
    `triton` takes bf16, fp16 and fp32, Dn + Dr up to 4096; with up, multiples of 16 up to 1024 for Dn, L and Dr.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    sizes = Shapes("mla_queries")
    sizes.bind("q", q, "B S H Dn+Dr", FLOATS)
    _tables(sizes, cos, sin, positions, interleaved, "Dn+Dr", "Dn")
    sizes.bind("up", up, "H Dn L", (q.dtype,), optional=True)
    problem = Problem.of("mla_queries", q=q, cos=cos, up=up, positions=positions, interleaved=interleaved)
    return select(problem, kernel).run(q, cos, sin, up=up, positions=positions, interleaved=interleaved)


def mla_latents(
    q_latent: torch.Tensor | None,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    kv_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    positions: torch.Tensor | None = None,
    interleaved: bool = True,
    kernel: str | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """RMSNorm of both down-projections and RoPE of the key's last Dr features, in one launch.

    q_latent     [B, S, Lq]      the dtype of kv, or None
    kv           [B, S, L + Dr]  bf16, fp16, fp32 or fp64: the latent, then the rope key
    q_weight     [Lq]            the norm's weight, in the dtype of kv or fp32; None: q_latent is returned as it is
    kv_weight    [L]             likewise; None: the latent is copied
    eps          added to the mean of squares
    The rest as in `mla_queries`; Dr is twice the tables' width. Any strides.

    Returns (q_latent', kv') in their shapes and dtype; kv' is contiguous, and so is q_latent' where it is normed.
    Gradients to all but the tables. Norm and rope are fp32 (fp64 for fp64 inputs), rounded once.
    The kernel `triton` takes bf16, fp16 and fp32, Lq and L + Dr up to 8192.
    Raises as `mla_queries`.
    """
    sizes = Shapes("mla_latents")
    sizes.bind("kv", kv, "B S L+Dr", FLOATS)
    sizes.bind("q_latent", q_latent, "B S Lq", (kv.dtype,), optional=True)
    _tables(sizes, cos, sin, positions, interleaved, "L+Dr", "L")
    weights = tuple(dict.fromkeys((kv.dtype, torch.float32)))
    sizes.bind("kv_weight", kv_weight, "L", weights, optional=True)
    if q_latent is None and q_weight is not None:
        raise ValueError("mla_latents: q_weight is given, but q_latent is None: give both, or only q_latent")
    sizes.bind("q_weight", q_weight, "Lq", weights, optional=True)
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"mla_latents: eps is {eps!r}, but must be a number of at least 0")
    problem = Problem.of(
        "mla_latents", kv=kv, q_latent=q_latent, cos=cos, q_weight=q_weight, kv_weight=kv_weight, positions=positions,
        interleaved=interleaved,
    )  # fmt: skip
    return select(problem, kernel).run(
        q_latent, kv, cos, sin, q_weight=q_weight, kv_weight=kv_weight, eps=eps, positions=positions,
        interleaved=interleaved,
    )  # fmt: skip


def _tables(sizes, cos, sin, positions, interleaved, whole, rest):
    """Check tables, positions and interleaved; sizes then knows Dr, and the rest of the whole."""
    one_of(sizes.operator, "interleaved", interleaved, (True, False))
    sizes.bind("cos", cos, "P Dr/2", _TABLE)
    sizes.bind("sin", sin, "P Dr/2", _TABLE)
    sizes.sizes |= {"Dr": 2 * sizes["Dr/2"], rest: sizes[whole] - 2 * sizes["Dr/2"]}
    if not sizes["Dr"] or sizes[rest] < 0:
        raise ValueError(
            f"{sizes.operator}: cos turns Dr = {sizes['Dr']} features, but must be from 2 to {whole} = {sizes[whole]}"
        )
    sizes.bind("positions", positions, "S", (torch.int32,), optional=True)
    if positions is None and sizes["P"] < sizes["S"]:
        raise ValueError(
            f"{sizes.operator}: cos has P = {sizes['P']} rows, but S = {sizes['S']} tokens need as many: "
            f"make the tables longer, or give positions"
        )
    if positions is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = positions[(positions < 0) | (positions >= sizes["P"])]
        if wrong.numel():
            raise ValueError(
                f"{sizes.operator}: positions has {wrong[0].item()}, but must be in 0 … P − 1 = {sizes['P'] - 1}"
            )
