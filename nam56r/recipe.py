"""Recipes: what a model is, apart from how and where it is trained.

A recipe is frozen and checked as a whole when it is made; `PRESETS` has those that are named. It is plain data: it
loads from and saves to YAML, and `with_overrides` changes it by dotted keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from nam56r import records
from nam56r.pattern import MAX_DEPTH, Pattern, parse
from nam56r.records import Frozen, shown

LARGEST = 2**31 - 1  # of any size: what kernels index with, and products of a few still fit a float


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _of_a_line(name: str) -> str:
    if not name.isprintable() or not 1 <= len(name) <= 100 or name != name.strip():
        raise ValueError("must be 1 to 100 printable characters, without blanks around them")
    return name


Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Index = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Layer = Annotated[int, Field(strict=True)]
_OF_A_LINE = {"pattern": r"^\S(.*\S)?$", "maxLength": 100}  # for a JSON schema, as near as it comes
Name = Annotated[str, AfterValidator(_of_a_line), Field(json_schema_extra=_OF_A_LINE)]
Role = Literal["mla", "dsa", "moe", "mamba3", "mamba2", "m2rnn"]


class MLA(Frozen):
    """Multi-head latent attention of every A slot (and of each MTP depth)."""

    num_heads: Count = 32
    q_lora_rank: Count = 64
    kv_lora_rank: Count = 64
    qk_nope_head_dim: Count = 64
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 64
    rope_theta: Positive = 500_000.0


class DSA(Frozen):
    """DeepSeek sparse attention on the A slots of the given ranks (0-based among A slots).

    Of the sparse slots, in order, every share_every-th computes indices; those between use the last ones and have
    no indexer of their own.
    """

    ranks: tuple[Index, ...] = ()
    index_num_heads: Count = 32
    index_head_dim: Count = 64
    top_k: Count = 256
    loss_coeff: Coefficient = 0.01
    share_every: Count = 1


class Mamba(Frozen):
    """The M slots. mimo_rank 1 is SISO; Mamba-2 has no MIMO and doesn't read it."""

    kind: Literal["mamba3", "mamba2"] = "mamba3"
    headdim: Count = 64
    expand: Count = 2
    d_state: Count = 128
    ngroups: Count = 8
    mimo_rank: Count = 4


class MoE(Frozen):
    """The E slots: sigmoid scores with an expert bias, routed experts with relu², a shared SwiGLU expert.

    num_experts 0 is MoE off: the recipe stands, and its translation refuses every E slot.
    """

    num_experts: Index = 16
    top_k: Count = 4
    ffn_hidden_size: Count = 896
    shared_ffn_hidden_size: Count = 1024
    aux_loss_coeff: Coefficient = 1e-4


class M2RNN(Frozen):
    """The R slots: q and k have one head each, v, f, g and W have num_heads."""

    k_head_dim: Count = 64
    v_head_dim: Count = 16
    num_heads: Count = 51
    conv_width: Annotated[int, Field(strict=True, ge=2, le=4)] = 4


class MTP(Frozen):
    """Multi-token prediction; each depth is one dense MLA and one dense SwiGLU block."""

    num_depths: Annotated[int, Field(strict=True, ge=0, le=MAX_DEPTH)] = 2
    loss_coeff: Coefficient = 0.1


class Recipe(Frozen):
    """One model. `pattern` is tiled to `depth`.

    features places what isn't implied by the rest: feature name -> 1-based layer numbers (none for a global one).
    Raises ValueError of one line that names every key at fault, its value, the rule and the remedy.
    """

    name: Name
    pattern: str = "AEMEAEMEAEMR"
    depth: Count = 52
    hidden_size: Count = 4096
    ffn_hidden_size: Count = 21504
    vocab_size: Annotated[int, Field(strict=True, ge=2, le=LARGEST)] = 131_072
    seq_length: Count = 4096
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02
    mla: MLA = MLA()
    dsa: DSA = DSA()
    mamba: Mamba = Mamba()
    moe: MoE = MoE()
    m2rnn: M2RNN = M2RNN()
    mtp: MTP = MTP()
    features: dict[Name, tuple[Layer, ...]] = {}

    def __init__(self, /, **values: Any):
        name = values.get("name", "without a name")
        known = name if isinstance(name, str) and len(name) <= 100 else shown(name)
        with records.explained(Recipe, f"recipe {known}"):
            super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def layers(self) -> Pattern:
        """The pattern tiled to the depth."""
        return parse(self.pattern).tile(self.depth)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the A layers with DSA."""
        attention = self.layers.numbers("A")
        return tuple(attention[rank] for rank in self.dsa.ranks)

    @property
    def indexer_layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers that compute indices; the others share the last ones."""
        return self.sparse_layers[:: self.dsa.share_every]

    @property
    def index_sources(self) -> dict[int, int]:
        """Of each sparse layer the one whose indices it uses: itself, or an earlier one."""
        layers, every = self.sparse_layers, self.dsa.share_every
        return {layer: layers[i - i % every] for i, layer in enumerate(layers)}

    @property
    def shares_indices(self) -> bool:
        """Whether any layer uses another's indices."""
        return self.indexer_layers != self.sparse_layers

    def carries_indices(self, segments: Iterable[Sequence[int]]) -> bool:
        """Whether, of segments with these layer numbers, any uses indices of one before it."""
        sources = self.index_sources
        return any(sources.get(layer, layer) < segment[0] for segment in segments for layer in segment)

    @property
    def roles(self) -> tuple[Role, ...]:
        """What each layer is, in order."""
        sparse = set(self.sparse_layers)
        plain = {"A": "mla", "E": "moe", "M": self.mamba.kind, "R": "m2rnn"}
        return tuple("dsa" if n in sparse else plain[s] for n, s in enumerate(self.layers.layers, 1))

    @property
    def mamba_heads(self) -> int:
        """Heads of an M slot: expand · hidden / headdim."""
        return self.mamba.expand * self.hidden_size // self.mamba.headdim

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A preset by name, or a YAML file by path. Raises ValueError of one line."""
        return records.load(cls, "recipe", name_or_path, PRESETS)

    def save(self, path: str | Path) -> None:
        """Write every value as YAML; `load` gives an equal recipe."""
        records.save(self, path)

    def with_overrides(self, settings: Iterable[str]) -> Recipe:
        """A recipe with "dotted.key=value" settings applied, values read as YAML ("dsa.ranks=[1, 2]").

        Raises ValueError of one line; an unknown key is answered with the nearest one.
        """
        values = self.model_dump()
        known = _flat(values)
        for said, key, value in records.assignments("--set", settings, "mla.kv_lora_rank=32"):
            *sections, last = key.split(".")
            target: Any = values
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            if not isinstance(target, dict) or (last not in target and sections != ["features"]):
                raise ValueError(f"{said}: {records.unknown(Recipe, key)}")
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside and key != "features":
                raise ValueError(f"{said}: {key} is a section: set one of {', '.join(inside)}")
            target[last] = value
        return Recipe(**values)

    def differences(self, other: Recipe) -> tuple[str, ...]:
        """What differs, key by key: "mla.kv_lora_rank: 64 here, 32 there"."""
        here, there = _flat(self.model_dump()), _flat(other.model_dump())
        keys = dict.fromkeys((*here, *there))
        return tuple(f"{k}: {here.get(k)} here, {there.get(k)} there" for k in keys if here.get(k) != there.get(k))


def _problems(recipe: Recipe) -> Iterator[str]:
    """Every rule over more than one field that a recipe breaks."""
    r, mla, dsa, mamba, moe, mtp = recipe, recipe.mla, recipe.dsa, recipe.mamba, recipe.moe, recipe.mtp
    try:
        pattern = r.layers
    except ValueError as error:
        yield f"pattern: {error}"
        return
    if pattern.mtp_depths and (pattern.mtp, pattern.mtp_depths) != ("+-", mtp.num_depths):
        wanted = "/+-" * mtp.num_depths or "no suffix"
        yield (
            f"pattern = {r.pattern}: its MTP suffix must be {wanted} for mtp.num_depths = {mtp.num_depths}: "
            "change one of the two, or leave the suffix out"
        )
    if mla.qk_rope_head_dim % 2:
        yield f"mla.qk_rope_head_dim = {mla.qk_rope_head_dim}, but rotation takes pairs: make it even"
    attention = pattern.counts["A"]
    if list(dsa.ranks) != sorted(set(dsa.ranks)):
        yield f"dsa.ranks = {list(dsa.ranks)}, but must rise without repeats: write {sorted(set(dsa.ranks))}"
    if dsa.ranks and max(dsa.ranks) >= attention:
        ranks = f"only 0 to {attention - 1} can be sparse" if attention else "none can be sparse"
        yield f"dsa.ranks = {list(dsa.ranks)}, but the pattern has {attention} A slots: {ranks}"
    if dsa.ranks and dsa.index_head_dim < mla.qk_rope_head_dim:
        yield (
            f"dsa.index_head_dim = {dsa.index_head_dim}, but its first mla.qk_rope_head_dim = {mla.qk_rope_head_dim} "
            "are rotated: make it at least that"
        )
    inner = mamba.expand * r.hidden_size
    if inner % mamba.headdim:
        yield (
            f"mamba.headdim = {mamba.headdim}, but must divide mamba.expand · hidden_size = {inner}: "
            "change one of the three"
        )
    elif r.mamba_heads % mamba.ngroups:
        yield f"mamba.ngroups = {mamba.ngroups}, but must divide the {r.mamba_heads} heads: choose a divisor"
    if mamba.kind == "mamba3" and mamba.d_state % 4:
        yield f"mamba.d_state = {mamba.d_state}, but a quarter of it are angles: make it a multiple of 4"
    if moe.num_experts and moe.top_k > moe.num_experts:
        yield f"moe.top_k = {moe.top_k}, but there are moe.num_experts = {moe.num_experts}: top_k can't be more"
    if mtp.num_depths >= r.seq_length:
        yield f"mtp.num_depths = {mtp.num_depths}, but must be less than seq_length = {r.seq_length}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


_NAM56R = Recipe(name="nam56r", dsa=DSA(ranks=(1, 2, 3, 5, 6, 7, 9, 10, 11)))
_NAM56R_3584 = Recipe(
    name="nam56r-3584",
    hidden_size=3584,
    ffn_hidden_size=18944,
    vocab_size=65_536,
    mla=MLA(num_heads=28),
    dsa=_NAM56R.dsa,
    m2rnn=M2RNN(num_heads=44),
    mtp=MTP(num_depths=1),
)
_QUARTER = Recipe(name="nam56r-quarter", depth=13, dsa=DSA(ranks=(1, 2, 3)), mtp=MTP(num_depths=1))
# One whole period; the vocabulary is that of Megatron's byte-level tokenizer.
_TINY = Recipe(
    name="nam56r-tiny",
    depth=12,
    hidden_size=256,
    ffn_hidden_size=512,
    vocab_size=512,
    seq_length=256,
    mla=MLA(num_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32),
    dsa=DSA(ranks=(1,), index_num_heads=4, index_head_dim=32, top_k=64),
    mamba=Mamba(d_state=32, ngroups=2, mimo_rank=2),
    moe=MoE(num_experts=4, top_k=2, ffn_hidden_size=256, shared_ffn_hidden_size=256),
    m2rnn=M2RNN(k_head_dim=32, num_heads=3),
    mtp=MTP(num_depths=1),
)
PRESETS = {recipe.name: recipe for recipe in (_NAM56R, _NAM56R_3584, _QUARTER, _TINY)}
