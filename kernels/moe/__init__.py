"""Routed experts (Shazeer et al., arXiv 1701.06538): each token through its top-k experts, summed by their gates."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes, one_of
from nam56r.kernels.moe import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select

ACTIVATIONS = ("relu2", "swiglu")


def moe_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    activation: str = "relu2",
    kernel: str | None = None,
) -> torch.Tensor:
    """out_t = Σ_k gates[t, k] · w_down[e] act(w_up[e] x_t), where e = expert_ids[t, k].

    x           [T, D]     bf16, fp16, fp32 or fp64
    expert_ids  [T, K]     int32 in 0 … E − 1, or −1: the slot is not used and gives nothing
    gates       [T, K]     any float dtype, usually fp32
    w_up        [E, F, D]  the dtype of x; [E, 2F, D] for swiglu, the gated half first, as Megatron lays it
    w_down      [E, D, F]  the dtype of x
    activation  "relu2": relu(h)². "swiglu": silu(h[:F]) · h[F:]
    kernel      a name from the registry; None takes the first that accepts the problem

    Returns out [T, D] in the dtype of x. Gradients go to x, gates, w_up and w_down, in their dtypes; the gate of an
    unused slot gets 0. An expert without tokens gets a zero gradient; a token without experts gives 0.
    An id out of range raises ValueError on a CPU. On CUDA ids can't be read without waiting for the device: there the
    `torch` kernel makes the token's output NaN.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    one_of("moe_experts", "activation", activation, ACTIVATIONS)
    sizes = Shapes("moe_experts")
    sizes.bind("x", x, "T D", FLOATS)
    sizes.bind("expert_ids", expert_ids, "T K", (torch.int32,))
    sizes.bind("gates", gates, "T K", FLOATS)
    sizes.bind("w_down", w_down, "E D F", (x.dtype,))
    sizes.sizes["2F"] = 2 * sizes["F"]
    sizes.bind("w_up", w_up, "E 2F D" if activation == "swiglu" else "E F D", (x.dtype,))
    if not sizes["E"]:
        raise ValueError("moe_experts: w_down has no experts (E = 0), but must have at least one")
    if expert_ids.device.type == "cpu":
        wrong = expert_ids[(expert_ids < -1) | (expert_ids >= sizes["E"])]
        if wrong.numel():
            raise ValueError(
                f"moe_experts: expert_ids has {wrong[0].item()}, but must be in 0 … E − 1 = {sizes['E'] - 1} or −1"
            )
    problem = Problem.of(
        "moe_experts", x=x, expert_ids=expert_ids, gates=gates, w_up=w_up, w_down=w_down, activation=activation
    )
    return select(problem, kernel).run(x, expert_ids, gates, w_up, w_down, activation)
