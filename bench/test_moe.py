"""Routed experts at the recipe's geometry, tokens spread evenly at random. No peer yet."""

import torch

from nam56r.kernels.moe import moe_experts


def test_moe_experts(measure):
    T, E, K, D, F = 8192, 16, 4, 4096, 896

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale).requires_grad_()

    x, w_up, w_down = draw(T, D), draw(E, F, D, scale=D**-0.5), draw(E, D, F, scale=F**-0.5)
    expert_ids = torch.rand(T, E, device="cuda").argsort(1)[:, :K].int()
    gates = torch.rand(T, K, device="cuda", requires_grad=True)

    def run(kernel):
        return moe_experts(x, expert_ids, gates, w_up, w_down, kernel=kernel)

    forward = 2 * 2 * T * K * D * F
    flops = {"fwd": forward, "fwd+bwd": 3 * forward}
    weights = w_up.nbytes + w_down.nbytes
    moved = {"fwd": weights + 2 * x.nbytes, "fwd+bwd": 3 * weights + 5 * x.nbytes}  # each tensor once a pass
    grad = (x, gates, w_up, w_down)
    measure("moe_experts", f"T{T} E{E} K{K} D{D} F{F}", "torch", run, grad=grad, flops=flops, moved=moved)
