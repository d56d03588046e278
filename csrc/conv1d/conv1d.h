// The causal depthwise convolution's functions, as bindings.cpp registers them.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace nam56r {

using torch::stable::Tensor;

// (y [B, S, C], final_state [n, W-1, C]), both contiguous and in x's dtype.
std::tuple<Tensor, Tensor> causal_conv1d_forward(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, bool silu);

// (dx [B, S, C], dweight [C, W], dbias [C], dinitial_state [n, W-1, C]), each in its argument's dtype; dbias and
// dinitial_state are empty ([0]) where the argument is left out. dfinal_state may be left out: zero.
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    Tensor dy, std::optional<Tensor> dfinal_state, Tensor x, Tensor weight, std::optional<Tensor> bias,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, bool silu);

}  // namespace nam56r
