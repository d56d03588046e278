"""The head and its loss at the recipe's vocabulary, beside PyTorch with the logits stored."""

import torch

from nam56r.kernels.cross_entropy import linear_cross_entropy


def test_linear_cross_entropy(measure):
    T, D, V = 8192, 4096, 131_072
    hidden = torch.randn(T, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = (torch.randn(V, D, dtype=torch.bfloat16, device="cuda") * D**-0.5).requires_grad_()
    labels = torch.randint(V, (T,), device="cuda")

    def run(kernel):
        return linear_cross_entropy(hidden, weight, labels, kernel=kernel)

    # one product forward, two backward; ours makes the logits again, which is not counted
    flops = {"fwd": 2 * T * D * V, "fwd+bwd": 6 * T * D * V}
    read = hidden.nbytes + weight.nbytes
    moved = {"fwd": read, "fwd+bwd": 3 * read}  # both passes read; the backward writes gradients
    case = f"T{T} D{D} V{V}"
    grad = (hidden, weight)
    measure(
        "linear_cross_entropy",
        case,
        "torch",
        run,
        grad=grad,
        flops=flops,
        moved=moved,
        peers=("peer:pytorch",),
    )
