// M²RNN's functions, as bindings.cpp registers them.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace nam56r {

using torch::stable::Tensor;

// The shapes that this extension holds code for: each {element type, V, row blocks, chunk} as in m2rnn_load.
std::vector<int64_t> m2rnn_built();

// Takes the four kernels (forward, gradient, products, reduce; by their names in the file) for one element type (0 fp32,
// 1 fp16, 2 bf16), V, row blocks of 16, and chunk from a cubin (its bytes, [n] uint8 on the CPU), for devices of its architecture.
void m2rnn_load(
    Tensor cubin, std::vector<std::string> names, int64_t element, int64_t columns, int64_t row_blocks,
    int64_t chunk, int64_t capability);

// (y [B, S, H, V], final_state [n, H, K, V] fp32, states). states holds each chunk's first state, or nothing ([0]).
std::tuple<Tensor, Tensor, Tensor> m2rnn_forward(
    Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, int64_t chunk, bool save_states);

// (dq, dk, dv, dweight, dforget, dinitial_state), in their arguments' shapes; the last three in fp32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> m2rnn_backward(
    std::optional<Tensor> dy, std::optional<Tensor> dfinal_state, Tensor q, Tensor k, Tensor v, Tensor weight,
    Tensor forget, Tensor states, std::optional<Tensor> cu_seqlens, int64_t chunk);

}  // namespace nam56r
