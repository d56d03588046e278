// Host code of M²RNN: which compiled kernels serve a problem, their grids, and what they write.
//
// What recipes name is instantiated here (kBuilt). Other shapes and architectures come as cubins that
// kernels/m2rnn/cuda.py compiles from the same sources and hands to m2rnn_load.

#include "m2rnn/m2rnn.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <numeric>

#include "common.h"
#include "m2rnn/kernels.cuh"

namespace nam56r {
namespace m2rnn {
namespace {

using torch::headeronly::ScalarType;

enum Stage { kForward, kGradient, kProducts, kReduce, kStages };

struct Functions {
  std::array<const void*, kStages> kernel;
  std::array<size_t, kStages> shared;  // bytes of shared memory
};

// Element type (0 fp32, 1 fp16, 2 bf16), V, row blocks, chunk, compute capability (90).
using Key = std::array<int64_t, 5>;

template <typename T, int V, int RB, int C>
std::array<size_t, kStages> shared_bytes() {
  return {
      sizeof(ForwardShared<T, V, RB, C>), sizeof(GradientShared<T, V, RB, C>), sizeof(ProductsShared<T, V, RB, C>), 0};
}

template <typename T, int V, int RB, int C>
Functions built() {
  return {
      {reinterpret_cast<const void*>(&forward<T, V, RB, C>), reinterpret_cast<const void*>(&gradient<T, V, RB, C>),
       reinterpret_cast<const void*>(&products<T, V, RB, C>), reinterpret_cast<const void*>(&reduce<T>)},
      shared_bytes<T, V, RB, C>()};
}

struct Built {
  int64_t element, columns, row_blocks, chunk;
  Functions (*functions)();
};
constexpr Built kBuilt[] = {
    {2, 16, 4, 16, built<BFloat16, 16, 4, 16>},  // nam56r
    {2, 16, 2, 16, built<BFloat16, 16, 2, 16>},  // nam56r-tiny
    {1, 16, 4, 8, built<Float16, 16, 4, 8>},
};

// Calls f with an integral constant of the value.
template <int... kValues, typename F>
auto with_constant(const char* what, int64_t value, F f) {
  std::optional<decltype(f(std::integral_constant<int, (kValues, ...)>{}))> result;
  ((value == kValues ? void(result = f(std::integral_constant<int, kValues>{})) : void()), ...);
  STD_TORCH_CHECK(result, "m2rnn: ", what, " is ", value);
  return *result;
}

std::array<size_t, kStages> shared_bytes(const Key& key) {
  return with_constant<0, 1, 2>("the element type", key[0], [&](auto element) {
    using T = std::tuple_element_t<decltype(element)::value, std::tuple<float, Float16, BFloat16>>;
    return with_constant<16, 32, 64>("V", key[1], [&](auto columns) {
      return with_constant<1, 2, 3, 4, 5, 6, 7, 8>("K / 16", key[2], [&](auto blocks) {
        return with_constant<1, 2, 4, 8, 16>("the chunk", key[3], [&](auto chunk) {
          return shared_bytes<
              T, decltype(columns)::value, decltype(blocks)::value, decltype(chunk)::value>();
        });
      });
    });
  });
}

std::mutex mutex;
std::map<Key, Functions> loaded;

int64_t element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::Half: return 1;
    case ScalarType::BFloat16: return 2;
    default: STD_TORCH_CHECK(false, "m2rnn: q must be float32, float16 or bfloat16");
  }
}

Functions functions_for(const Tensor& q, const Tensor& v, int64_t chunk) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, q.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, q.get_device_index()));
  const Key key{element_of(q), v.size(3), (q.size(3) + 15) / 16, chunk, 10 * major + minor};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(key);
  if (found != loaded.end()) return found->second;
  for (const Built& one : kBuilt)
    if (one.element == key[0] && one.columns == key[1] && one.row_blocks == key[2] && one.chunk == key[3])
      return one.functions();
  STD_TORCH_CHECK(
      false, "m2rnn: K = ", q.size(3), ", V = ", v.size(3), " is neither built ahead nor compiled yet: call "
      "nam56r.kernels.m2rnn.m2rnn, which compiles it");
}

template <typename Arguments>
void launch(
    const Functions& f, Stage stage, int64_t blocks, int threads, const Arguments& arguments, const Tensor& on) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "m2rnn: the problem takes ", blocks, " blocks: too many");
  const void* kernel = f.kernel[stage];
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(f.shared[stage])));
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  STD_CUDA_CHECK(
      cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), pointers, f.shared[stage], stream_of(on)));
}

Rows rows(const Tensor& t) {
  const int64_t bytes = t.element_size();
  bool vector = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(t.dim() - 1) % 8 == 0;
  for (int i = 0; i < 3; ++i) vector = vector && (t.size(i) == 1 || t.stride(i) * bytes % 16 == 0);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), vector};
}

const float* floats(const std::optional<Tensor>& t) {
  STD_TORCH_CHECK(!t || t->scalar_type() == ScalarType::Float, "m2rnn: states must be float32 here");
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

struct Problem {
  Tensor q, k, v, weight, forget;
  std::optional<Tensor> cu_seqlens;
  int64_t batches, length, heads, keys, columns, row_blocks, sequences, chunk;
  Inputs in;

  Problem(
      const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& weight_, const Tensor& forget_,
      const std::optional<Tensor>& cu, int64_t chunk_)
      : q(dense_rows(q_)), k(dense_rows(k_)), v(dense_rows(v_)), weight(dense(weight_)), forget(forget_),
        cu_seqlens(dense(cu)),
        batches(q.size(0)), length(q.size(1)), heads(v.size(2)), keys(q.size(3)), columns(v.size(3)),
        row_blocks((keys + 15) / 16), sequences(cu_seqlens ? cu_seqlens->size(0) - 1 : batches), chunk(chunk_) {
    STD_TORCH_CHECK(batches < (1 << 30) && length < (1 << 30), "m2rnn: B and S must each be below 2^30");
    STD_TORCH_CHECK(chunk > 0 && heads > 0, "m2rnn: chunk and H must be positive");
    STD_TORCH_CHECK(
        k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "m2rnn: k and v must have q's dtype");
    for (const Tensor& t : {weight, forget})
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "m2rnn: weight and forget must be float32 here");
    in = {rows(q), rows(k), rows(v), rows(forget), floats(weight),
          cu_seqlens ? static_cast<const int*>(cu_seqlens->const_data_ptr()) : nullptr,
          int(length), int(heads), int(sequences), int(keys), int(heads / q.size(2)), int(heads / k.size(2))};
  }
  // Chunks of `steps` that may be numbered: see sequence_number.
  int64_t chunks(int64_t steps) const {
    return cu_seqlens ? length / steps + sequences : batches * ((length + steps - 1) / steps);
  }
  // Floats of dq's or dk's partial sums: 8 steps' places a run, 16 rows a row block.
  int64_t sums(int64_t units, int64_t groups) const {
    return units * groups * (chunk * kUnit / std::min<int64_t>(chunk, 8)) * row_blocks * 128;
  }
  Tensor new_floats(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(weight, sizes, ScalarType::Float);
  }
  Tensor new_states(int64_t count) const { return new_floats({count, heads, row_blocks * 16 * columns}); }
};

// How many of the heads that share q and k a block of `products` takes one after the other: few enough that the blocks
// fill the device in whole rounds, many enough that the partial dq and dk stay small.
int64_t heads_a_block(const Problem& p, int64_t shared_heads, int64_t units, int processors) {
  constexpr int64_t kPartialBytes = int64_t(64) << 20, kResident = 3;  // of bf16 at K 64, V 16
  int64_t best = shared_heads, best_cost = INT64_MAX;
  for (int64_t heads = 1; heads <= shared_heads; ++heads) {
    const int64_t groups = p.heads / shared_heads * ((shared_heads + heads - 1) / heads);
    if (heads < shared_heads && 8 * p.sums(units, groups) > kPartialBytes) continue;
    const int64_t rounds = (units * groups + kResident * processors - 1) / (kResident * processors);
    const int64_t cost = rounds * (4 * heads + 1);
    if (cost < best_cost) best = heads, best_cost = cost;
  }
  return best;
}

}  // namespace
}  // namespace m2rnn

std::vector<int64_t> m2rnn_built() {
  std::vector<int64_t> shapes;
  for (const auto& one : m2rnn::kBuilt)
    for (int64_t value : {one.element, one.columns, one.row_blocks, one.chunk}) shapes.push_back(value);
  return shapes;
}

void m2rnn_load(
    Tensor cubin, std::vector<std::string> names, int64_t element, int64_t columns, int64_t row_blocks,
    int64_t chunk, int64_t capability) {
  using namespace m2rnn;
  STD_TORCH_CHECK(names.size() == kStages, "m2rnn_load: names has ", names.size(), " entries, but must have 4");
  const Key key{element, columns, row_blocks, chunk, capability};
  cudaLibrary_t library;  // stays loaded for the process
  STD_CUDA_CHECK(cudaLibraryLoadData(&library, cubin.const_data_ptr(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  Functions functions{{}, shared_bytes(key)};
  for (int stage = 0; stage < kStages; ++stage) {
    cudaKernel_t kernel;
    STD_CUDA_CHECK(cudaLibraryGetKernel(&kernel, library, names[stage].c_str()));
    functions.kernel[stage] = reinterpret_cast<const void*>(kernel);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  loaded[key] = functions;
}

std::tuple<Tensor, Tensor, Tensor> m2rnn_forward(
    Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, int64_t chunk, bool save_states) {
  using namespace m2rnn;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Problem p(q, k, v, weight, forget, cu_seqlens, chunk);
  initial_state = dense(initial_state);
  Tensor y = torch::stable::new_empty(p.v, {p.batches, p.length, p.heads, p.columns});
  Tensor final_state = p.new_floats({p.sequences, p.heads, p.keys, p.columns});
  Tensor states = p.new_states(save_states ? p.chunks(chunk) : 0);
  const ForwardArguments arguments{
      p.in, floats(initial_state), y.mutable_data_ptr(), static_cast<float*>(final_state.mutable_data_ptr()),
      save_states ? static_cast<float*>(states.mutable_data_ptr()) : nullptr};
  launch(functions_for(p.q, p.v, chunk), kForward, p.sequences * p.heads, int(p.row_blocks) * 64, arguments, p.q);
  return {y, final_state, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> m2rnn_backward(
    std::optional<Tensor> dy, std::optional<Tensor> dfinal_state, Tensor q, Tensor k, Tensor v, Tensor weight,
    Tensor forget, Tensor states, std::optional<Tensor> cu_seqlens, int64_t chunk) {
  using namespace m2rnn;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Problem p(q, k, v, weight, forget, cu_seqlens, chunk);
  const Functions functions = functions_for(p.q, p.v, chunk);
  if (dy) dy = dense_rows(*dy);
  dfinal_state = dense(dfinal_state);
  const auto to = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };

  const int64_t units = p.chunks(chunk * kUnit);
  Tensor gradients = p.new_states(units);
  Tensor dinitial_state = p.new_floats({p.sequences, p.heads, p.keys, p.columns});
  const Rows dy_rows = dy ? rows(*dy) : Rows{};
  const GradientArguments walk{p.in, dy_rows, floats(states), floats(dfinal_state), to(gradients), to(dinitial_state)};
  launch(functions, kGradient, p.sequences * p.heads, int(p.row_blocks) * 96, walk, p.q);

  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, p.q.get_device_index()));
  const int64_t query_heads = p.q.size(2), key_heads = p.k.size(2);
  const int64_t shared_heads = std::gcd(p.in.heads_a_query, p.in.heads_a_key);
  const int64_t heads = heads_a_block(p, shared_heads, units, processors);
  const int64_t groups_a_segment = (shared_heads + heads - 1) / heads, groups = p.heads / shared_heads * groups_a_segment;
  Tensor dv = torch::stable::new_empty(p.v, {p.batches, p.length, p.heads, p.columns});
  Tensor dforget = p.new_floats({p.batches, p.length, p.heads});
  Tensor dq_parts = p.new_floats({p.sums(units, groups)}), dk_parts = p.new_floats({p.sums(units, groups)});
  Tensor dweight_parts = p.new_floats({units, p.heads, p.columns, p.columns});
  const auto fours = [&](Tensor& t) { return reinterpret_cast<float4*>(to(t)); };
  const ProductArguments product{
      p.in, dy_rows, floats(states), floats(gradients), dv.mutable_data_ptr(), to(dforget), fours(dq_parts),
      fours(dk_parts), to(dweight_parts), int(shared_heads), int(heads)};
  launch(functions, kProducts, units * groups, int(p.row_blocks) * 32, product, p.q);

  Tensor dq = torch::stable::new_empty(p.q, {p.batches, p.length, query_heads, p.keys});
  Tensor dk = torch::stable::new_empty(p.k, {p.batches, p.length, key_heads, p.keys});
  Tensor dweight = p.new_floats({p.heads, p.columns, p.columns});
  const int64_t rows = p.batches * p.length;
  const ReduceArguments reduction{
      p.in, to(dq_parts), to(dk_parts), to(dweight_parts), dq.mutable_data_ptr(), dk.mutable_data_ptr(), to(dweight),
      rows, units, int(groups), int(chunk), int(p.columns), int(p.row_blocks)};
  const int64_t results = rows * p.keys * (query_heads + key_heads) + p.heads * p.columns * p.columns;
  launch(functions, kReduce, (results + 255) / 256, 256, reduction, p.q);
  return {dq, dk, dv, dweight, dforget, dinitial_state};
}

}  // namespace nam56r
