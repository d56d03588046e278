"""Memory of a training step, estimated from the recipe and its plan before anything is built: one device, or each
pipeline rank.

An estimate to refuse with, not a measurement: it adds what lives through the step (weights, gradients, optimizer), what
the forward keeps for the backward, and the largest workspaces of the loss and of a layer. Activations are
counted per token as plain modules keep them; the history that a kernel keeps of its own is added where it runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from nam56r import parameters
from nam56r.kernels.dsa import by_key, cuda
from nam56r.kernels.m2rnn.cuda import chunk_of, row_blocks
from nam56r.kernels.registry import DEVICES, Device
from nam56r.kernels.ssd.sizes import MAMBA2, MIMO, SISO, sizes_of
from nam56r.parameters import FAMILIES, FAMILY
from nam56r.plan import MEGATRON, Part, Plan, Slot
from nam56r.recipe import Recipe

GIB = 2**30
RUNTIME = 1 * GIB  # interpreter, libraries, a CUDA context, the allocator's slack
LOGITS_BLOCK = 3 * 2**27  # three blocks of 2^25 fp32 logits, as the chunked loss holds them
CHUNK = 64  # steps (mamba3: steps × rank) between the states that a reference scan keeps
SPARSE = ("triton", "triton_atomic")  # kernels of sparse attention and of the indexer's loss
Recompute = Literal["none", "full"]


@dataclass(frozen=True)
class Held:
    """Bytes that one family of parameters and layers takes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device. by_family has every name of `parameters.FAMILIES`; logits is the loss's share; workspace is
    the most that one layer takes and gives back."""

    by_family: dict[str, Held]
    logits: int
    workspace: int = 0
    runtime: int = RUNTIME

    @property
    def weights(self) -> int:
        return sum(held.weights for held in self.by_family.values())

    @property
    def gradients(self) -> int:
        return sum(held.gradients for held in self.by_family.values())

    @property
    def optimizer(self) -> int:
        return sum(held.optimizer for held in self.by_family.values())

    @property
    def activations(self) -> dict[str, int]:
        """By family."""
        return {family: held.activations for family, held in self.by_family.items()}

    @property
    def total(self) -> int:
        return sum(held.total for held in self.by_family.values()) + self.logits + self.workspace + self.runtime

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": sum(self.activations.values()),
            "logits": self.logits,
            "workspace": self.workspace,
            "runtime": self.runtime,
        }
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def estimate(recipe: Recipe, plan: Plan, *, expert_parallel: int = 1, optimizer_shards: int = 1) -> Estimate:
    """Bytes of one training step on one device without pipeline: the one rank of `stages`."""
    whole = (tuple(range(1, recipe.depth + 1)),)
    (one,) = stages(recipe, plan, segments=whole, expert_parallel=expert_parallel, optimizer_shards=optimizer_shards)
    return one


def stages(
    recipe: Recipe,
    plan: Plan,
    *,
    segments: Sequence[Sequence[int]],
    pipeline: int = 1,
    expert_parallel: int = 1,
    context_parallel: int = 1,
    optimizer_shards: int = 1,
    microbatches: int = 1,
    recompute: Recompute = "none",
) -> tuple[Estimate, ...]:
    """Bytes of one training step on a device of each pipeline rank.

    plan               of this recipe: its dtype, micro-batch, tensor parallelism and kernels; a refused one will do
    segments           layer numbers of each pipeline segment, in order; segment i is on rank i mod pipeline, so that
                       len(segments) = pipeline × virtual stages
    expert_parallel    devices that the routed experts are spread over
    context_parallel   devices that a sequence is spread over
    optimizer_shards   devices that share the optimizer's state (the distributed optimizer), data- times context-parallel;
                       the routed experts' state is shared by those with the same experts. 1 for none
    microbatches       passes in one step; a rank holds the activations of those that its schedule has in flight
    recompute          "full": a layer keeps its input only, and one layer at a time what it needs in its backward

    Megatron's mixed precision: weights in the plan's dtype, gradients in fp32, Adam's two moments in fp32, and for
    16-bit weights an fp32 copy. Tensor parallelism splits all but R, the norms and the routed experts. The first rank
    has the embedding; the last one the MTP depths, the final norm, the head, and, where it isn't the first, the copy of
    the embedding that Megatron's MTP reads. Raises ValueError for sizes that don't fit together.
    """
    _check_layout(
        recipe,
        segments,
        recompute,
        pipeline=pipeline,
        expert_parallel=expert_parallel,
        context_parallel=context_parallel,
        optimizer_shards=optimizer_shards,
        microbatches=microbatches,
    )
    if pipeline == 1:
        segments = [[layer for segment in segments for layer in segment]]
    model = _Model(recipe, plan, expert_parallel, context_parallel, optimizer_shards, recompute)
    carried = recipe.carries_indices(segments)
    ranks = []
    for rank in range(pipeline):
        last = rank == pipeline - 1
        chunks = [
            model.chunk(layers, first=i == 0, last=i == len(segments) - 1, carried=carried)
            for i, layers in enumerate(segments)
            if i % pipeline == rank
        ]
        counts = in_flight(rank, pipeline, microbatches, [sum(chunk.kept.values()) for chunk in chunks])
        weights: dict[str, int] = defaultdict(int)
        owned: dict[str, int] = defaultdict(int)
        activations: dict[str, int] = defaultdict(int)
        for chunk, count in zip(chunks, counts, strict=True):
            for family, (number, own) in chunk.parameters.items():
                weights[family] += number
                owned[family] += own
            for family, size in chunk.kept.items():
                activations[family] += count * size
        family, size = max((chunk.working for chunk in chunks), key=lambda working: working[1])
        activations[family] += size
        ranks.append(
            Estimate(
                {family: model.held(weights[family], owned[family], activations[family]) for family in FAMILIES},
                logits=counts[-1] * model.logits() if last else 0,
                workspace=max(chunk.workspace for chunk in chunks),
            )
        )
    return tuple(ranks)


def in_flight(rank: int, pipeline: int, microbatches: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """How many microbatches each chunk of a pipeline rank holds when together they take most.

    sizes has the bytes that one microbatch keeps in each of the rank's chunks (virtual stages). The order is that of
    Megatron's 1F1B for one chunk and of its interleaved schedule for more, with groups of `pipeline` microbatches:
    warm-up forwards, then a forward and a backward in turn, backwards through the chunks in reverse.
    """
    chunks = len(sizes)
    order = [
        chunk
        for start in range(0, microbatches, pipeline)
        for chunk in range(chunks)
        for _ in range(start, min(start + pipeline, microbatches))
    ]
    behind = pipeline - rank - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * pipeline
    live = [0] * chunks
    peak, most = tuple(live), -1
    for step, chunk in enumerate(order):
        live[chunk] += 1
        held = sum(count * size for count, size in zip(live, sizes, strict=True))
        if held > most:
            peak, most = tuple(live), held
        if step >= warm_up:
            live[chunks - 1 - order[step - warm_up]] -= 1
    return peak


def available(device: Device) -> int | None:
    """Bytes that a process can still take on a device; what a device has where it isn't here; None if unknown.

    CPU: what the machine or the process's control group has left, whichever is less.
    """
    if device.type == "cuda":
        if torch.cuda.is_available() and Device.of("cuda").name == device.name:
            return torch.cuda.mem_get_info()[0]
        return int(device.memory_gib * GIB) if device.memory_gib else None
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        limits += [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (group / "memory.max").read_text().strip() != "max":
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(int((group / "memory.max").read_text()) - used + int(stat["inactive_file"]))
    return min(limits, default=None)


def check(estimated: Estimate, device: Device, free: int | None) -> None:
    """Raise ValueError, in one line, when a step is estimated to need more than is free. Unknown (None) passes."""
    if free is None or estimated.total <= free:
        return
    raise ValueError(
        f"not enough memory (estimated before it starts): {estimated.total / GIB:.1f} GiB needed ({estimated}), "
        f"{free / GIB:.1f} GiB free on {device.name}: take a smaller micro-batch, sequence or recipe, or more devices"
    )


def _check_layout(recipe: Recipe, segments: Sequence[Sequence[int]], recompute: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, but must be a whole number from 1")
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute is {recompute!r}, but must be one of {', '.join(get_args(Recompute))}")
    if [layer for segment in segments for layer in segment] != list(range(1, recipe.depth + 1)):
        raise ValueError(f"segments is {segments}, but must have each layer from 1 to {recipe.depth} once, in order")
    if len(segments) % sizes["pipeline"]:
        raise ValueError(
            f"pipeline is {sizes['pipeline']}, but must divide the number of segments, which is {len(segments)}"
        )


@dataclass(frozen=True)
class _Chunk:
    """One segment: parameters and, for one microbatch, bytes kept, by family; the working set of a recomputed layer; the
    most that a layer takes for itself."""

    parameters: dict[str, tuple[int, int]]
    kept: dict[str, int]
    working: tuple[str, int]
    workspace: int


@dataclass(frozen=True)
class _Model:
    """What every pipeline rank shares."""

    recipe: Recipe
    plan: Plan
    expert_parallel: int
    context_parallel: int
    optimizer_shards: int
    recompute: Recompute

    @property
    def element(self) -> int:
        return getattr(torch, self.plan.dtype).itemsize

    @property
    def indices(self) -> int:
        """Bytes of a token's indices. A layer and all that use its indices keep the same ones."""
        return 4 * self.recipe.dsa.top_k

    @property
    def tokens(self) -> float:
        """Of one microbatch on one device."""
        return self.plan.micro_batch * self.recipe.seq_length / self.context_parallel

    def chunk(self, layers: Sequence[int], *, first: bool, last: bool, carried: bool) -> _Chunk:
        """carried: indices of sparse attention travel between all segments, as columns of what a segment receives."""
        recipe, vocabulary = self.recipe, self.recipe.vocab_size * self.recipe.hidden_size
        count: dict[str, int] = defaultdict(int)
        routed = 0
        kept: dict[str, int] = defaultdict(int)
        working = ("norm", 0)
        for number in layers:
            shared, experts = self._parameters(number)
            count[FAMILY[recipe.roles[number - 1]]] += shared
            routed += experts
            count["norm"] += recipe.hidden_size
        if last:
            count["norm"] += recipe.hidden_size
            count["mtp"] += recipe.mtp.num_depths * (
                parameters.size(parameters.mtp(recipe)) // self.plan.tensor_parallel
            )
            count["head"] += vocabulary // self.plan.tensor_parallel
            kept["head"] = int(self.tokens * 2 * recipe.hidden_size * self.element)
        if first or (last and recipe.mtp.num_depths):
            count["embedding"] += vocabulary // self.plan.tensor_parallel
        for family, inputs, size in self._activations(layers, mtp=last):
            if self.recompute == "full":
                kept[family] += int(self.tokens * inputs)
                working = max(working, (family, int(self.tokens * (size - inputs))), key=lambda pair: pair[1])
            else:
                kept[family] += int(self.tokens * size)
        if carried and not first:
            # as received, and where this segment or a later one uses them, once more apart
            taken = any(source < min(layers, default=0) <= user for user, source in recipe.index_sources.items())
            kept[FAMILY["dsa"]] += int(self.tokens * self.indices * (1 + taken))
        owned = {family: (number, number // self.optimizer_shards) for family, number in count.items()}
        if routed:
            number, own = owned["moe"]
            owned["moe"] = number + routed, own + routed // self._expert_shards
        slots = (self.plan.slots[number - 1] for number in layers)
        workspace = max((_workspace(recipe, slot, self.tokens, self.element) for slot in slots), default=0)
        return _Chunk(owned, kept, working, workspace)

    @property
    def _expert_shards(self) -> int:
        """Routed experts are the same on fewer devices, by EP, and on more, by TP, which doesn't split them."""
        alike = self.optimizer_shards * self.plan.tensor_parallel // self.expert_parallel
        return max(1, alike) if self.optimizer_shards > 1 else 1

    def held(self, weights: int, owned: int, activations: int) -> Held:
        """owned: those of the weights whose optimizer state is this device's."""
        moments = 12 if self.element < 4 else 8
        return Held(weights * self.element, weights * 4, owned * moments, activations)

    def logits(self) -> int:
        """The loss's share: whole logits, kept for each depth, where the kernel stores them; a few blocks where not."""
        recipe, plan = self.recipe, self.plan
        whole = int(self.tokens * recipe.vocab_size) // plan.tensor_parallel
        passes = 1 + len(plan.mtp)
        kernel = plan.head.kernels.get("linear_cross_entropy")
        if kernel == "reference":
            return whole * 4 * (passes + 2)
        if kernel == MEGATRON:
            return whole * ((self.element + 4) * passes + 4)
        return min(LOGITS_BLOCK, whole * 12) + int(self.tokens * recipe.hidden_size * 4)

    def _parameters(self, number: int) -> tuple[int, int]:
        """Of one layer, on one device, without its input norm: all but the routed experts, and those."""
        shapes = parameters.layer(self.recipe, number)
        whole = parameters.size(shapes)
        if self.recipe.roles[number - 1] == "m2rnn":
            return whole, 0
        routed = parameters.size({name: shape for name, shape in shapes.items() if name in ("w_up", "w_down")})
        return (whole - routed) // self.plan.tensor_parallel, routed // self.expert_parallel

    def _activations(self, layers: Sequence[int], *, mtp: bool) -> Iterator[tuple[str, float, float]]:
        """(family, bytes a token of its inputs, bytes a token of all that it keeps) of each layer and MTP depth."""
        row = self.recipe.hidden_size * self.element
        used = {source for layer, source in self.recipe.index_sources.items() if layer != source}
        for number in layers:
            slot = self.plan.slots[number - 1]
            inputs = row + self.indices * (number in used)  # those of the layers that use its indices
            yield FAMILY[slot.role], inputs, _slot(self.recipe, self.plan, slot, self.element)
        for part in self.plan.mtp if mtp else ():
            yield "mtp", 2 * row, _mtp(self.recipe, self.plan, part, self.element)


def _slot(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """Bytes a token that one layer keeps: its input and normed input, then what the block keeps."""
    blocks = {"mla": _mla, "dsa": _dsa, "moe": _moe, "mamba3": _mamba3, "mamba2": _mamba2, "m2rnn": _m2rnn}
    return 2 * recipe.hidden_size * element + blocks[slot.role](recipe, plan, slot, element)


def _mla(recipe: Recipe, plan: Plan, part: Part, element: int) -> float:
    """Latents before and after their norms; rotated queries; the attention's output and logsumexp, and with our kernels
    what the output's rounding to 16 bits lost.

    Absorbed: the queries before too, which the weight's gradient takes, and what the values' weight makes of the output.
    Expanded: the latent apart, keys and values as projected; the output once more where Megatron's order is another;
    with PyTorch's kernel, keys with their rope.
    """
    a, heads = recipe.mla, recipe.mla.num_heads / plan.tensor_parallel
    nope, rope, value, latent = a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank
    kept = element * 2 * (a.q_lora_rank + latent + rope) + 4 * heads
    if absorbed := "latent_attention" in part.kernels:
        query, given = latent + rope, latent
        kept += element * heads * (nope + rope + query + given + value)
    else:
        query, given = nope + rope, value
        kept += element * (latent + heads * (query + nope + value + given * (1 + (plan.micro_batch > 1))))
    kernel = part.kernels.get("latent_attention" if absorbed else "mla_attention")
    if kernel in ("cuda", "triton") and element == 2:
        kept += element * heads * given
    if kernel == "torch":
        kept += element * heads * query
        if plan.device == "cpu" and query != value:  # where PyTorch keeps the probabilities
            kept += 4 * heads * recipe.seq_length
    if kernel == "reference":  # scores as probabilities, twice; in half precision also its fp32 inputs and output
        kept += 8 * heads * recipe.seq_length + (4 * heads * (query + given) if element < 4 else 0)
    return kept


def _dsa(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """As MLA in latent form; the indexer's q and weights, its k before and after the norm, and indices. Of our kernels
    the attention keeps its exponents and what out's rounding to 16 bits lost; the loss, the slopes of the index scores.
    """
    a, s, heads = recipe.mla, recipe.dsa, recipe.mla.num_heads / plan.tensor_parallel
    nope, rope, value, latent = a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank
    outputs = 1 + (plan.micro_batch > 1)  # once more in Megatron's order, where that is another
    kept: float = element * 2 * (a.q_lora_rank + latent + rope)
    kept += element * heads * (nope + rope + latent + rope + outputs * latent + value)
    attention, loss = (slot.kernels.get(operator) for operator in ("sparse_latent_attention", "indexer_kl_loss"))
    top_k = min(s.top_k, recipe.seq_length)
    if attention in SPARSE:
        kept += 4 * heads + (element * heads * latent if element == 2 else 0)
    if attention == "reference":
        kept += 4 * (top_k * (latent + rope + 2 * heads) + heads * (latent + rope))  # gathered keys, scores, fp32 q
    if slot.layer in recipe.indexer_layers:
        kept += element * (s.index_num_heads * (s.index_head_dim + 1) + 2 * s.index_head_dim) + 4 * s.top_k
        if loss in SPARSE:
            kept += 4 * s.top_k
        if loss == "reference":
            kept += 4 * top_k * (s.index_head_dim + 2 * s.index_num_heads + 4)
    return kept


def _workspace(recipe: Recipe, slot: Slot, tokens: float, element: int) -> int:
    """Bytes that a layer takes of its own: the indexer's lists in the forward; in the backward of sparse attention or of the
    indexer's loss the keys' gradient in fp32, and where it is summed in one order, rows of gradient."""
    attention, loss = recipe.mla.kv_lora_rank + recipe.mla.qk_rope_head_dim, recipe.dsa.index_head_dim
    indexed = slot.kernels.get("index_top_k", "").startswith("cuda")
    most = cuda.lists_bytes(int(tokens), recipe.dsa.top_k) if indexed else 0
    for operator, width in (("sparse_latent_attention", attention), ("indexer_kl_loss", loss)):
        if slot.role == "dsa" and slot.kernels.get(operator) in SPARSE:
            ordered = slot.kernels[operator] == SPARSE[0]
            rows = by_key.buffer_bytes(int(tokens), recipe.dsa.top_k, width * element) if ordered else 0
            most = max(most, int(tokens) * width * 4 + rows)
    return most


def _moe(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The routed slots' hidden rows; the shared expert's gate and up, their parts and product; the router's fp32.

    A reference keeps each slot's rows too: input, activation, output.
    """
    e = recipe.moe
    routed = e.top_k * e.ffn_hidden_size
    if slot.kernels.get("moe_experts") == "reference":
        routed += 2 * e.top_k * (recipe.hidden_size + e.ffn_hidden_size)
    return element * (routed + 5 * e.shared_ffn_hidden_size / plan.tensor_parallel) + 4 * 8 * e.num_experts


def _mamba3(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The projection's output, B and C as their norm takes and gives them, dt, decay and trap in fp32, y; the scan's
    states."""
    m, heads = recipe.mamba, recipe.mamba_heads / plan.tensor_parallel
    inner, mixed = heads * m.headdim, 2 * m.mimo_rank * m.ngroups * m.d_state / plan.tensor_parallel
    kept = element * (3 * inner + 3 * mixed) + 4 * 6 * heads
    return kept + _scan_states(recipe, plan, slot)


def _mamba2(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The projection's output, the convolution's, y, that normed; the scan's states.

    The convolution's reference keeps a fp32 product for each tap of 16-bit inputs.
    """
    m, heads = recipe.mamba, recipe.mamba_heads / plan.tensor_parallel
    inner = heads * m.headdim
    mixed = inner + 2 * m.ngroups * m.d_state / plan.tensor_parallel
    kept = element * (3 * inner + 2 * mixed + heads)
    if slot.kernels.get("causal_conv1d") == "reference":
        kept += 4 * mixed * (2 if element >= 4 else parameters.MAMBA2_CONV + 1)
    return kept + _scan_states(recipe, plan, slot)


def _scan_states(recipe: Recipe, plan: Plan, slot: Slot) -> float:
    """Bytes a token that an M slot's scan keeps of its own."""
    m, kernel = recipe.mamba, slot.kernels.get(f"{slot.role}_scan")
    rank, turned = (m.mimo_rank, True) if slot.role == "mamba3" else (1, False)
    if kernel == "reference":
        return 4 * rank * recipe.mamba_heads * m.headdim * m.d_state / CHUNK / plan.tensor_parallel
    if kernel != "cuda":
        return 0
    sequences, model = (plan.micro_batch, recipe.seq_length), (MIMO if rank > 1 else SISO) if turned else MAMBA2
    x = torch.empty(*sequences, recipe.mamba_heads // plan.tensor_parallel, m.headdim, device="meta")
    B = torch.empty(*sequences, rank, max(1, m.ngroups // plan.tensor_parallel), m.d_state, device="meta")
    angles = torch.empty(*sequences, 1, m.d_state // 4, device="meta") if turned else None
    sizes = sizes_of(model, x, B, angles, None)
    # a state for every part, an angle for every chunk, and sums and weights of decays for every token
    kept = sizes.parts * m.headdim * m.d_state * 4 + sizes.chunks * sizes.pairs * 4
    kept += (4 if turned else 2) * sizes.tokens * 4
    return sizes.heads * kept / sizes.tokens


def _m2rnn(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The projection's output, as wide as it is padded; the convolution's, the scan's, gated, normed; decay in fp32.

    Scans keep states too, and references copies; that of the convolution, a fp32 product for each tap of 16-bit inputs.
    """
    r = recipe.m2rnn
    width = r.num_heads * r.v_head_dim
    mixed = 2 * r.k_head_dim + width
    projected = 64 * math.ceil((mixed + r.num_heads + width) / 64)  # 64: PRODUCT_COLUMNS of megatron/linear.py
    kept: float = element * (projected + mixed + 3 * width) + 4 * 3 * r.num_heads
    if slot.kernels.get("causal_conv1d") == "reference":
        kept += 4 * mixed * (2 if element >= 4 else r.conv_width + 1)
    if slot.kernels.get("m2rnn") == "reference":
        state = r.num_heads * r.k_head_dim * r.v_head_dim
        kept += 4 * (r.num_heads * (2 * r.k_head_dim + r.v_head_dim + 1) + state / CHUNK)
    if slot.kernels.get("m2rnn") == "cuda":  # a device that has no name here is taken for one with short chunks
        capability = DEVICES[plan.device].capability if plan.device in DEVICES else (8, 0)
        chunk = chunk_of(r.k_head_dim, r.v_head_dim, getattr(torch, plan.dtype), capability)
        kept += 4 * r.num_heads * 16 * row_blocks(r.k_head_dim) * r.v_head_dim / chunk
    return kept


def _mtp(recipe: Recipe, plan: Plan, part: Part, element: int) -> float:
    """One depth: the concatenated input and its norms, MLA, SwiGLU, the final norm."""
    d, ffn = recipe.hidden_size, recipe.ffn_hidden_size / plan.tensor_parallel
    return _mla(recipe, plan, part, element) + element * (12 * d + 5 * ffn)
