"""The language-model head and its loss in one operator, so that the logits need not be stored."""

from __future__ import annotations

import torch

from nam56r.kernels.checks import FLOATS, Shapes
from nam56r.kernels.cross_entropy import support  # noqa: F401  (the registry's import, which torch.compile can't trace)
from nam56r.kernels.registry import Problem, select


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    kernel: str | None = None,
) -> torch.Tensor:
    """loss_t = lse_t − (hidden_t · weightᵀ)[label_t] + z_loss · lse_t², where lse_t = logsumexp(hidden_t · weightᵀ).

    hidden        [T, D]  bf16, fp16, fp32 or fp64
    weight        [V, D]  the dtype of hidden
    labels        [T]     int64 in 0 … V − 1, or ignore_index: that token's loss is 0 and it gives no gradient
    z_loss        at least 0; keeps lse near 0 (PaLM, arXiv 2204.02311, section 5)
    kernel        a name from the registry; None takes the first that accepts the problem

    Returns loss [T] in nats, fp32 (fp64 for fp64 inputs). Gradients go to hidden and weight, in their dtypes.
    A label out of range raises ValueError on a CPU. On CUDA labels can't be read without waiting for the device:
    there the token's loss is NaN, and so are the gradients that it takes part in.
    Raises ValueError or TypeError, naming the argument, when shapes, dtypes or devices disagree; NoKernel when no
    kernel takes the problem.
    """
    sizes = Shapes("linear_cross_entropy")
    sizes.bind("hidden", hidden, "T D", FLOATS)
    sizes.bind("weight", weight, "V D", (hidden.dtype,))
    sizes.bind("labels", labels, "T", (torch.int64,))
    if not isinstance(z_loss, (int, float)) or not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss!r}, but must be a number of at least 0")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[((labels < 0) | (labels >= sizes["V"])) & (labels != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"linear_cross_entropy: labels has {wrong[0].item()}, but must be in 0 … V − 1 = {sizes['V'] - 1} or "
                f"ignore_index = {ignore_index}"
            )
    problem = Problem.of("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels, z_loss=z_loss)
    return select(problem, kernel).run(hidden, weight, labels, ignore_index, z_loss)
