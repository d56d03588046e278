// Host code of the indexer: which kernel a shape has, its maps and its launch.

#include "dsa/dsa.h"

#include <algorithm>
#include <cmath>

#include "dsa/index.cuh"
#include "dsa/quantise.cuh"
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

// Calls f with the element type of q and k.
template <typename F>
void with_element(const Tensor& q, F f) {
  if (q.scalar_type() == ScalarType::BFloat16) f(BFloat16{});
  else if (q.scalar_type() == ScalarType::Half) f(Float16{});
  else STD_TORCH_CHECK(false, "dsa_index: q must be bfloat16 or float16");
}

// Calls f with the first of the shapes that has room for so many heads.
template <class Sh, class... Others, typename F>
void with_room(int64_t heads, F f) {
  if (heads <= Sh::MOST) f(Sh{});
  else if constexpr (sizeof...(Others)) with_room<Others...>(heads, f);
  else STD_TORCH_CHECK(false, "dsa_index: no kernel for ", heads, " heads");
}

// What doesn't depend on how queries and keys are written down.
struct Request {
  const Tensor& q;
  Tensor cu_seqlens, indices;
  Arguments a{};

  Request(const Tensor& q, int64_t top_k, const std::optional<Tensor>& cu_seqlens_, Tensor& status)
      : q(q), indices(torch::stable::new_empty(q, {q.size(0), q.size(1), top_k}, ScalarType::Int)) {
    if (cu_seqlens_) {
      cu_seqlens = dense(*cu_seqlens_);
      a.cu = static_cast<const int*>(cu_seqlens.const_data_ptr()), a.sequences = int(cu_seqlens.size(0)) - 1;
    }
    a.indices = static_cast<int*>(indices.mutable_data_ptr()), a.status = static_cast<int*>(status.mutable_data_ptr());
    a.batch = int(q.size(0)), a.length = int(q.size(1)), a.heads = int(q.size(2)), a.top_k = int(top_k);
    a.capacity = int(capacity_of(top_k, a.length));
  }

  // q's rows of 16-bit columns and k's, as they lie in memory: sizes and strides as tensor_map takes them.
  template <class Sh>
  void run(const void* q_rows, const int64_t (&q_sizes)[4], const int64_t (&q_strides)[3], const void* k_rows, int64_t k_columns,
           const int64_t (&k_strides)[3]) {
    int processors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
    const int64_t pieces = int64_t(a.length + Sh::QUERIES - 1) / Sh::QUERIES * a.batch;
    STD_TORCH_CHECK(int64_t(a.batch) * a.length < (1 << 30), "dsa_index: B S must be below 2^30");
    // of an even number of rounds, all blocks have long pieces and short ones alike
    const int64_t fitting = std::max<int64_t>(1, kLists / (int64_t(processors) * Sh::QUERIES * a.capacity * 8));
    const int64_t together = std::min<int64_t>(pieces, (fitting > 1 ? fitting / 2 * 2 : 1) * processors);
    Tensor lists = torch::stable::new_empty(q, {together, Sh::QUERIES, a.capacity, 2}, ScalarType::Int);
    Tensor counts = torch::stable::new_empty(q, {together, Sh::QUERIES, 2}, ScalarType::Int);
    a.lists = static_cast<uint2*>(lists.mutable_data_ptr()), a.counts = static_cast<int2*>(counts.mutable_data_ptr());
    const Maps maps{tensor_map<4>("dsa_index", q_rows, q_sizes, q_strides, {64, Sh::QUERIES, Sh::HEADS, 1}),
                    tensor_map<4>("dsa_index", k_rows, {k_columns, a.length, a.batch, 1}, k_strides, {64, kGroupKeys, 1, 1})};
    const auto kernel = index<Sh>;
    const auto selecting = select<Sh::QUERIES>;
    const int room = kSelecting / 32 * Room(a.top_k).bytes();
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared<Sh>))));
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(selecting), cudaFuncAttributeMaxDynamicSharedMemorySize, room));
    for (int64_t first = 0; first < pieces; first += together) {
      a.first = int(first), a.pieces = int(std::min(together, pieces - first));
      const unsigned blocks = unsigned(std::min<int64_t>(a.pieces, processors)), rows = unsigned(a.pieces * Sh::QUERIES);
      kernel<<<blocks, Sh::THREADS, sizeof(Shared<Sh>), stream_of(q)>>>(a, maps);
      selecting<<<(rows + kSelecting / 32 - 1) / (kSelecting / 32), kSelecting, room, stream_of(q)>>>(a);
    }
    STD_CUDA_CHECK(cudaGetLastError());
  }
};

template <typename T, int D>
void quantise_rows(const Tensor& x, const Tensor& to, const Tensor& scales, const Tensor* weights, int64_t heads, int64_t padded) {
  const int64_t rows = x.numel() / D, blocks = std::min<int64_t>((rows * (D / 16) + kQuantising - 1) / kQuantising, 1 << 14);
  quantise<T, D><<<unsigned(blocks), kQuantising, 0, stream_of(x)>>>(
      static_cast<const T*>(x.const_data_ptr()), static_cast<unsigned char*>(to.mutable_data_ptr()), static_cast<float*>(scales.mutable_data_ptr()),
      weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr, rows, int(heads), int(padded));
}

}  // namespace
}  // namespace dsa

Tensor dsa_index(Tensor q, Tensor k, Tensor weights, int64_t top_k, std::optional<Tensor> cu_seqlens, Tensor status) {
  using namespace dsa;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Request request(q, top_k, cu_seqlens, status);
  if (request.indices.numel() == 0) return request.indices;
  const Tensor q_ = mappable(q), k_ = mappable(k), weights_ = dense(weights);
  request.a.weights = static_cast<const float*>(weights_.const_data_ptr());
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), d = q.size(3);
  with_element(q, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto shape) {
      request.run<decltype(shape)>(q_.const_data_ptr(), {d, length, heads, batch}, {q_.stride(1), q_.stride(2), q_.stride(0)},
                                   k_.const_data_ptr(), d, {k_.stride(1), k_.stride(0), 0});
    };
    if (d <= 64) with_room<Shape<T, 64, 32>, Shape<T, 64, 8>>(heads, run);
    else with_room<Shape<T, 128, 8>, Shape<T, 128, 4>>(heads, run);
  });
  return request.indices;
}

Tensor dsa_index_fp8(Tensor q, Tensor k, Tensor weights, int64_t top_k, std::optional<Tensor> cu_seqlens, Tensor status) {
  using namespace dsa;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Request request(q, top_k, cu_seqlens, status);
  if (request.indices.numel() == 0) return request.indices;
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), d = q.size(3);
  const Tensor q_ = dense(mappable(q)), k_ = dense(mappable(k)), weights_ = dense(weights);  // on 16 bytes, too
  const auto with_dim = [&](auto dim) {
    constexpr int D = decltype(dim){}, PACK = 128 / D;
    const int64_t padded = (heads + PACK - 1) / PACK * PACK, columns = padded * D / 2;
    Tensor q_rows = torch::stable::new_empty(q, {batch, length, padded, D}, ScalarType::Byte);
    Tensor k_rows = torch::stable::new_empty(q, {batch, length, D}, ScalarType::Byte);
    Tensor scaled = torch::stable::new_empty(q, {batch, length, heads}, ScalarType::Float);
    Tensor scales = torch::stable::new_empty(q, {batch, length}, ScalarType::Float);
    with_element(q, [&](auto element) {
      quantise_rows<decltype(element), D>(q_, q_rows, scaled, &weights_, heads, padded);
      quantise_rows<decltype(element), D>(k_, k_rows, scales, nullptr, 1, 1);
    });
    request.a.weights = static_cast<const float*>(scaled.const_data_ptr()), request.a.scales = static_cast<const float*>(scales.const_data_ptr());
    with_room<Shape<E4M3, 64, 32, PACK>, Shape<E4M3, 64, 8, PACK>>(heads, [&](auto shape) {
      request.run<decltype(shape)>(q_rows.const_data_ptr(), {64, length, columns / 64, batch}, {columns, 64, length * columns},
                                   k_rows.const_data_ptr(), D / 2, {D / 2, length * D / 2, 0});
    });
  };
  if (d == 32) with_dim(Int<32>{});
  else if (d == 64) with_dim(Int<64>{});
  else if (d == 128) with_dim(Int<128>{});
  else STD_TORCH_CHECK(false, "dsa_index_fp8: no kernel for heads of ", d);
  return request.indices;
}

}  // namespace nam56r
