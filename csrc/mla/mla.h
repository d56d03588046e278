// Attention's functions, as bindings.cpp registers them.
//
// Absorbed: q [B, S, H, 128], k [B, T, 128], whose first 64 columns are the value; k_rope and v are left out.
// Expanded: q [B, S, H, Dn + 64], k [B, T, H, Dn], k_rope [B, T, 64], v [B, T, H, Dv] with Dn, Dv 64, 64 or 128, 128.
// All bf16 or fp16; cu_seqlens int32 [n + 1] (B 1, S = T). out [B, S, H, Dv], lse [B, S, H] float32.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace nam56r {

using torch::stable::Tensor;

// out, lse, and with save what out's rounding lost [B, S, H, Dv], which backward asks for
std::tuple<Tensor, Tensor, Tensor> mla_forward(
    Tensor q, Tensor k, std::optional<Tensor> k_rope, std::optional<Tensor> v, std::optional<Tensor> cu_seqlens, double scale,
    bool causal, int64_t query_offset, bool save);

// dq, dk, dk_rope, dv; absorbed, nothing in the last two.
std::tuple<Tensor, Tensor, Tensor, Tensor> mla_backward(
    std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, std::optional<Tensor> k_rope, std::optional<Tensor> v,
    Tensor out, Tensor lse, Tensor rest, std::optional<Tensor> cu_seqlens, double scale, bool causal, int64_t query_offset);

}  // namespace nam56r
