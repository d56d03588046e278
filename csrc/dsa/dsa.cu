// Host code of the indexer: which kernel a shape has, its maps and its launch.

#include "dsa/dsa.h"

#include <algorithm>
#include <cmath>

#include "dsa/index.cuh"
#include "hopper/map.h"

namespace nam56r {
namespace dsa {
namespace {

using torch::headeronly::ScalarType;

// Entries of a list: somewhat more than what scores in no order bring to it, and room for a tile; all keys where they are fewer.
int64_t capacity_of(int64_t top_k, int64_t length) {
  const double expected = 1.25 * top_k * (1 + std::log(std::max(1., double(length) / top_k)));
  const int64_t most = std::min<int64_t>({int64_t(expected) + 512, 6 * top_k + 512, length + 2 * kKeys});
  return (std::max(most, 2 * top_k + 2 * kKeys) + 63) / 64 * 64;
}
constexpr int64_t kLists = int64_t(320) << 20;  // bytes of the lists of a launch, unless a piece for every processor takes more

// Calls f with the element type and the shape: as many queries as there is room for with all heads.
template <typename F>
void with_kernel(const Tensor& q, F f) {
  const int64_t heads = q.size(2), d = q.size(3);
  const auto with_element = [&](auto shape) {
    if (q.scalar_type() == ScalarType::BFloat16) f(BFloat16{}, shape);
    else if (q.scalar_type() == ScalarType::Half) f(Float16{}, shape);
    else STD_TORCH_CHECK(false, "dsa_index: q must be bfloat16 or float16");
  };
  if (d <= 64 && heads <= Shape<64, 32>::MOST) with_element(Shape<64, 32>{});
  else if (d <= 64 && heads <= Shape<64, 8>::MOST) with_element(Shape<64, 8>{});
  else if (d <= 128 && heads <= Shape<128, 8>::MOST) with_element(Shape<128, 8>{});
  else if (d <= 128 && heads <= Shape<128, 4>::MOST) with_element(Shape<128, 4>{});
  else STD_TORCH_CHECK(false, "dsa_index: no kernel for ", heads, " heads of ", d);
}

}  // namespace
}  // namespace dsa

Tensor dsa_index(Tensor q, Tensor k, Tensor weights, int64_t top_k, std::optional<Tensor> cu_seqlens, Tensor status) {
  using namespace dsa;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), d = q.size(3);
  Tensor indices = torch::stable::new_empty(q, {batch, length, top_k}, ScalarType::Int);
  if (indices.numel() == 0) return indices;
  q = mappable(q), k = mappable(k), weights = dense(weights), cu_seqlens = dense(cu_seqlens);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  with_kernel(q, [&](auto element, auto shape) {
    using Sh = decltype(shape);
    const int64_t pieces = (length + Sh::QUERIES - 1) / Sh::QUERIES * batch, capacity = capacity_of(top_k, length);
    STD_TORCH_CHECK(pieces < (1 << 25), "dsa_index: B S must be below 2^27");
    // of an even number of rounds, blocks have long pieces and short ones alike
    const int64_t fitting = std::max<int64_t>(1, kLists / (processors * Sh::QUERIES * capacity * 8)), rounds = fitting > 1 ? fitting & ~1 : 1;
    const int64_t together = std::min<int64_t>(pieces, rounds * processors);
    Tensor lists = torch::stable::new_empty(q, {together, Sh::QUERIES, capacity, 2}, ScalarType::Int);
    Tensor counts = torch::stable::new_empty(q, {together, Sh::QUERIES, 2}, ScalarType::Int);
    Arguments a{};
    a.cu = cu_seqlens ? static_cast<const int*>(cu_seqlens->const_data_ptr()) : nullptr;
    a.sequences = cu_seqlens ? int(cu_seqlens->size(0)) - 1 : 0;
    a.weights = static_cast<const float*>(weights.const_data_ptr());
    a.lists = static_cast<uint2*>(lists.mutable_data_ptr()), a.counts = static_cast<int2*>(counts.mutable_data_ptr());
    a.indices = static_cast<int*>(indices.mutable_data_ptr());
    a.status = static_cast<int*>(status.mutable_data_ptr());
    a.batch = int(batch), a.length = int(length), a.heads = int(heads), a.top_k = int(top_k), a.capacity = int(capacity);
    Maps maps{};
    maps.q = tensor_map<4>(
        "dsa_index", q.const_data_ptr(), {d, length, heads, batch}, {q.stride(1), q.stride(2), q.stride(0)}, {64, Sh::QUERIES, Sh::HEADS, 1});
    maps.k = tensor_map<4>("dsa_index", k.const_data_ptr(), {d, length, batch, 1}, {k.stride(1), k.stride(0), 0}, {64, kGroupKeys, 1, 1});
    const auto kernel = index<decltype(element), Sh>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared<Sh>))));
    const auto selecting = select<Sh::QUERIES>;
    const int room = Room(int(top_k)).bytes();
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(selecting), cudaFuncAttributeMaxDynamicSharedMemorySize, room));
    for (int64_t first = 0; first < pieces; first += together) {
      a.first = int(first), a.pieces = int(std::min(together, pieces - first));
      const unsigned blocks = unsigned(std::min<int64_t>(a.pieces, processors)), rows = unsigned(a.pieces * Sh::QUERIES) * 32;
      kernel<<<blocks, Sh::THREADS, sizeof(Shared<Sh>), stream_of(q)>>>(a, maps);
      selecting<<<(rows + kSelecting - 1) / kSelecting, kSelecting, room, stream_of(q)>>>(a);
    }
    STD_CUDA_CHECK(cudaGetLastError());
  });
  return indices;
}

}  // namespace nam56r
