// Host code: how a tensor of 16-bit elements lies in memory, for TMA; one that TMA can fetch.
#pragma once

#include <cuda.h>

#include "common.h"
#include "hopper/device.cuh"

namespace nam56r {

// A tensor that TMA can fetch: its last dimension dense, its rows on 16 bytes, none at another's place; others are copied.
inline torch::stable::Tensor mappable(const torch::stable::Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) fits = fits && (t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) % 8 == 0));
  if (fits) return t;
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

// Boxes are swizzled as a Tile is, and what of them lies outside of the tensor is 0. sizes and box from the last dimension on;
// strides, in elements, of the dimensions before it: an axis of one has any. `family` is for the error.
template <int kDims>
TensorMap tensor_map(
    const char* family, const void* address, const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims - 1], const int64_t (&box)[kDims]) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(function, "the driver has no cuTensorMapEncodeTiled: install one of CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t lengths[kDims], apart[kDims - 1];
  cuuint32_t boxes[kDims], steps[kDims];
  for (int i = 0; i < kDims; ++i) lengths[i] = cuuint64_t(sizes[i]), boxes[i] = cuuint32_t(box[i]), steps[i] = 1;
  for (int i = 1; i < kDims; ++i) apart[i - 1] = sizes[i] == 1 ? 16 : cuuint64_t(strides[i - 1] * 2);
  TensorMap map;
  static_assert(sizeof(map) == sizeof(CUtensorMap));
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, kDims, const_cast<void*>(address), lengths, apart, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, family, ": cuTensorMapEncodeTiled refuses a tensor's strides (error ", int(result), ")");
  return map;
}

}  // namespace nam56r
