// Sparse attention's functions, as bindings.cpp registers them.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace nam56r {

using torch::stable::Tensor;

// q [B, S, H, D], k [B, S, D] bf16 or fp16, D 32, 64 or 128; weights [B, S, H] float32; cu_seqlens int32 [n + 1] (B 1); status
// int32 [1], set to 1 where a score is NaN. Indices [B, S, top_k] int32.
Tensor dsa_index(Tensor q, Tensor k, Tensor weights, int64_t top_k, std::optional<Tensor> cu_seqlens, Tensor status);

// The same by products of e4m3: rows of q and k, each divided by its own power of two, are rounded to that first.
Tensor dsa_index_fp8(Tensor q, Tensor k, Tensor weights, int64_t top_k, std::optional<Tensor> cu_seqlens, Tensor status);

}  // namespace nam56r
