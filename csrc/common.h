// Shared by every family's host code: the current stream, the launch check, dense tensors.
#pragma once

#include <optional>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace nam56r {

// The stream that PyTorch is using on the tensor's device.
inline cudaStream_t stream_of(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A tensor whose last dimension is dense; others are copied.
inline torch::stable::Tensor dense_rows(const torch::stable::Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) == 1 ? t : torch::stable::contiguous(t);
}

inline torch::stable::Tensor dense(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<torch::stable::Tensor> dense(const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional(dense(*t)) : std::nullopt;
}

}  // namespace nam56r
