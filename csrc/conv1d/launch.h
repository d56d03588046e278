// Host code that the forward and the backward of the causal convolution share: arguments, tiling, dispatch.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common.h"
#include "conv1d/conv1d.h"
#include "conv1d/device.cuh"

namespace nam56r::conv1d {

using torch::headeronly::ScalarType;

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
Rows<T> rows(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// The arguments after checking, every one but x contiguous.
struct Arguments {
  Tensor x, weight;
  std::optional<Tensor> bias, initial_state, cu_seqlens;
  int width;
  int64_t batches, length, channels, sequences;

  Arguments(
      const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
      const std::optional<Tensor>& initial_state_, const std::optional<Tensor>& cu_seqlens_)
      : x(dense_rows(x_)),
        weight(dense(weight_)),
        bias(dense(bias_)),
        initial_state(dense(initial_state_)),
        cu_seqlens(dense(cu_seqlens_)),
        width(int(weight.size(1))),
        batches(x.size(0)),
        length(x.size(1)),
        channels(x.size(2)),
        sequences(cu_seqlens ? cu_seqlens->size(0) - 1 : batches) {
    constexpr int64_t kMost = (int64_t(1) << 31) - 4096;
    STD_TORCH_CHECK(
        batches < kMost && length < kMost && channels < kMost,
        "causal_conv1d: B, S and C must each be below 2^31 - 4096");
    STD_TORCH_CHECK(
        sequences > 0 || batches * length == 0, "causal_conv1d: cu_seqlens holds no sequence, but x has rows");
  }

  // Whether every access can be `bytes` wide (at most 16).
  bool vectorized(int bytes, std::initializer_list<std::optional<Tensor>> more = {}) const {
    const int64_t vector = bytes / int64_t(x.element_size());
    const auto aligned = [&](const std::optional<Tensor>& t) {
      return !t || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
    };
    const auto in_step = [&](const Tensor& t) { return t.stride(0) % vector == 0 && t.stride(1) % vector == 0; };
    bool fits = channels % vector == 0 && in_step(x);
    for (const auto& t : {std::optional(x), std::optional(weight), bias, initial_state}) fits = fits && aligned(t);
    for (const auto& t : more) fits = fits && aligned(t) && (!t || in_step(*t));
    return fits;
  }

  template <typename T>
  Inputs<T> inputs(int run) const {
    return {
        rows<T>(x),
        weight.const_data_ptr(),
        bias ? bias->const_data_ptr() : nullptr,
        weight.scalar_type() == ScalarType::Float,
        bias && bias->scalar_type() == ScalarType::Float,
        pointer<T>(initial_state),
        pointer<int>(cu_seqlens),
        int(batches), int(length), int(channels), int(sequences),
        run, int((length + run - 1) / run)};
  }

  // The longest run that still gives the device enough threads to keep its memory busy.
  int run_length(int64_t threads_per_row, std::initializer_list<int> longest_first) const {
    constexpr int64_t kEnough = 40'000;  // 300 threads an SM, each with 64 bytes or more on their way
    for (int run : longest_first)
      if (batches * length / run * threads_per_row >= kEnough) return run;
    return *(longest_first.end() - 1);
  }
};

// Calls f with a value of the element type, and with integral constants of the width and the two switches.
template <typename F>
void dispatch(ScalarType type, int width, bool silu, bool packed, F f) {
  const auto with_bool = [](bool value, auto g) { value ? g(std::true_type{}) : g(std::false_type{}); };
  const auto with_type = [&](auto t) {
    const auto with_width = [&](auto w) {
      with_bool(silu, [&](auto s) { with_bool(packed, [&](auto p) { f(t, w, s, p); }); });
    };
    switch (width) {
      case 2: return with_width(std::integral_constant<int, 2>{});
      case 3: return with_width(std::integral_constant<int, 3>{});
      case 4: return with_width(std::integral_constant<int, 4>{});
      default: STD_TORCH_CHECK(false, "causal_conv1d: weight has width ", width, ", but must have 2, 3 or 4");
    }
  };
  switch (type) {
    case ScalarType::Float: return with_type(float{});
    case ScalarType::Half: return with_type(__half{});
    case ScalarType::BFloat16: return with_type(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "causal_conv1d: x must be float32, float16 or bfloat16");
  }
}

}  // namespace nam56r::conv1d
