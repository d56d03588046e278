"""Memory of a training step on one device, estimated from the recipe and its plan before anything is built.

An estimate to refuse with, not a measurement: it adds what lives through the step (weights, gradients, optimizer), what
the forward keeps for the backward without recompute, and the largest workspace of the loss. Activations are counted
per token as plain modules keep them; a reference kernel's own history is added where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nam56r.kernels.registry import Device
from nam56r.parameters import FAMILY, parameters
from nam56r.plan import MEGATRON, Part, Plan, Slot
from nam56r.recipe import Recipe

GIB = 2**30
RUNTIME = 1 * GIB  # interpreter, libraries, a CUDA context, the allocator's slack
LOGITS_BLOCK = 3 * 2**27  # three blocks of 2^25 fp32 logits, as the chunked loss holds them
CHUNK = 64  # steps (mamba3: steps × rank) between the states that a reference scan keeps


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device; activations by family."""

    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    logits: int
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.logits, self.runtime)
        return sum(parts) + sum(self.activations.values())

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": sum(self.activations.values()),
            "logits": self.logits,
            "runtime": self.runtime,
        }
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def estimate(recipe: Recipe, plan: Plan, *, expert_parallel: int = 1, optimizer_shards: int = 1) -> Estimate:
    """Bytes of one training step on one device.

    plan               of this recipe: its dtype, micro-batch, tensor parallelism and kernels; a refused one will do
    expert_parallel    devices that the routed experts are spread over
    optimizer_shards   devices that share the optimizer's state (the distributed optimizer); 1 for none

    Megatron's mixed precision: weights in the plan's dtype, gradients in fp32, Adam's two moments in fp32, and for
    16-bit weights an fp32 copy. Tensor parallelism splits all but R, the norms and the routed experts.
    """
    weights = _weights(recipe, plan.tensor_parallel, expert_parallel)
    element = getattr(torch, plan.dtype).itemsize
    tokens = plan.micro_batch * recipe.seq_length
    activations: dict[str, int] = {}
    for slot in plan.slots:
        family = FAMILY[slot.role]
        kept = _slot(recipe, plan, slot, element)
        activations[family] = activations.get(family, 0) + int(tokens * kept)
    activations["mtp"] = int(tokens * sum(_mtp(recipe, plan, part, element) for part in plan.mtp))
    activations["head"] = tokens * 2 * recipe.hidden_size * element
    return Estimate(
        weights=weights * element,
        gradients=weights * 4,
        optimizer=weights * (12 if element < 4 else 8) // optimizer_shards,
        activations=activations,
        logits=_logits(recipe, plan, tokens, element),
    )


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


def _weights(recipe: Recipe, tensor_parallel: int, expert_parallel: int) -> int:
    counts = {family: total for family, (total, _) in parameters(recipe).items()}
    e = recipe.moe
    routed = recipe.layers.counts["E"] * e.num_experts * 2 * e.ffn_hidden_size * recipe.hidden_size
    whole = counts.pop("m2rnn") + counts.pop("norm")
    return whole + routed // expert_parallel + (sum(counts.values()) - routed) // tensor_parallel


def _slot(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """Bytes a token that one layer keeps: its input and normed input, then what the block keeps."""
    block = {"mla": _mla, "dsa": _dsa, "moe": _moe, "m2rnn": _m2rnn}.get(slot.role, _mamba)
    return 2 * recipe.hidden_size * element + block(recipe, plan, slot, element)


def _mla(recipe: Recipe, plan: Plan, part: Part, element: int) -> float:
    """Latents before and after their norms; q before and after rotation; keys and values as projected; k; out."""
    a, heads = recipe.mla, recipe.mla.num_heads / plan.tensor_parallel
    head_dim = a.qk_nope_head_dim + a.qk_rope_head_dim
    latents = 2 * (a.q_lora_rank + a.kv_lora_rank + a.qk_rope_head_dim)
    kept = element * (latents + heads * (3 * head_dim + a.qk_nope_head_dim + 2 * a.v_head_dim))
    reference = part.kernels.get("mla_attention") == "reference"
    if reference or (plan.device == "cpu" and head_dim != a.v_head_dim):  # where PyTorch keeps the probabilities
        kept += 4 * heads * recipe.seq_length
    if reference and element < 4:
        kept += 4 * heads * (2 * head_dim + a.v_head_dim)
    return kept


def _dsa(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """As MLA in latent form (q, out over the latent), and the indexer's q, k, weights and indices."""
    a, s, heads = recipe.mla, recipe.dsa, recipe.mla.num_heads / plan.tensor_parallel
    latent = a.kv_lora_rank + a.qk_rope_head_dim
    top_k = min(s.top_k, recipe.seq_length)
    indexer = slot.layer in recipe.indexer_layers
    q_heads = heads * (2 * (a.qk_nope_head_dim + a.qk_rope_head_dim) + latent + a.kv_lora_rank + a.v_head_dim)
    kept = element * (2 * (a.q_lora_rank + latent) + q_heads)
    if slot.kernels.get("sparse_latent_attention") == "reference":
        kept += 4 * (top_k * (latent + 2 * heads) + heads * latent)  # gathered keys, scores, fp32 q
    if indexer:
        kept += element * (2 * s.index_num_heads * s.index_head_dim + 2 * s.index_head_dim + s.index_num_heads)
        kept += 4 * s.top_k
        if slot.kernels.get("indexer_kl_loss") == "reference":
            kept += 4 * top_k * (s.index_head_dim + 2 * s.index_num_heads + 4)
    return kept


def _moe(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The routed slots' hidden rows; the shared expert's gate and up, their parts and product; the router's fp32.

    A reference keeps each slot's rows too: input, activation, output.
    """
    e = recipe.moe
    routed = e.top_k * e.ffn_hidden_size
    if slot.kernels.get("moe_experts") == "reference":
        routed += 2 * e.top_k * (recipe.hidden_size + e.ffn_hidden_size)
    return element * (routed + 5 * e.shared_ffn_hidden_size / plan.tensor_parallel) + 4 * 8 * e.num_experts


def _mamba(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The projection's output, normed B and C, dt, decay and trap in fp32, y; a reference's states."""
    m, heads = recipe.mamba, recipe.mamba_heads / plan.tensor_parallel
    rank = m.mimo_rank if slot.role == "mamba3" else 1
    inner, mixed = heads * m.headdim, 2 * rank * m.ngroups * m.d_state / plan.tensor_parallel
    kept = element * (4 * inner + 3 * mixed) + 4 * 6 * heads
    if slot.kernels.get(f"{slot.role}_scan") == "reference":
        kept += 4 * rank * inner * m.d_state / CHUNK
    return kept


def _m2rnn(recipe: Recipe, plan: Plan, slot: Slot, element: int) -> float:
    """The projection's output, the convolution's, forget, y and gate in fp32, normed; a reference's copies and states."""
    r = recipe.m2rnn
    mixed, width = 2 * r.k_head_dim + r.num_heads * r.v_head_dim, r.num_heads * r.v_head_dim
    kept: float = element * (3 * mixed + 3 * width) + 4 * (5 * width + 5 * r.num_heads)
    if slot.kernels.get("m2rnn") == "reference":
        state = r.num_heads * r.k_head_dim * r.v_head_dim
        kept += 4 * (r.num_heads * (2 * r.k_head_dim + r.v_head_dim + 1) + state / CHUNK)
    return kept


def _mtp(recipe: Recipe, plan: Plan, part: Part, element: int) -> float:
    """One depth: the concatenated input and its norms, MLA, SwiGLU, the final norm."""
    d, ffn = recipe.hidden_size, recipe.ffn_hidden_size / plan.tensor_parallel
    return _mla(recipe, plan, part, element) + element * (12 * d + 5 * ffn)


def _logits(recipe: Recipe, plan: Plan, tokens: int, element: int) -> int:
    """The loss's share: whole logits, kept for each depth, where the kernel stores them; a few blocks where not."""
    whole = tokens * recipe.vocab_size // plan.tensor_parallel
    passes = 1 + len(plan.mtp)
    kernel = plan.head.kernels.get("linear_cross_entropy")
    if kernel == "reference":
        return whole * 4 * (passes + 2)
    if kernel == MEGATRON:
        return whole * ((element + 4) * passes + 4)
    return min(LOGITS_BLOCK, whole * 12) + tokens * recipe.hidden_size * 4
