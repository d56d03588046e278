// Host code of attention: which kernels a shape has, their maps and launches.

#include "mla/mla.h"

#include <algorithm>

#include "hopper/map.h"
#include "mla/kernels.cuh"

namespace nam56r {
namespace mla {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kPadded = 384;  // rows of facts: a multiple of every kernel's tile

constexpr int64_t kCache = int64_t(32) << 20;  // of the L2 cache's 50 MiB, for keys and values, or queries and dout

struct Problem {
  Tensor q, k;
  std::optional<Tensor> k_rope, v, cu;
  bool shared;
  int64_t batch, queries, keys, heads, nope, rope, value;
  Arguments a{};
  int processors = 0;

  Problem(
      const Tensor& q_, const Tensor& k_, const std::optional<Tensor>& k_rope_, const std::optional<Tensor>& v_,
      const std::optional<Tensor>& cu_, double scale, bool causal, int64_t offset)
      : q(mappable(q_)), k(mappable(k_)), cu(dense(cu_)), shared(!v_), batch(q.size(0)), queries(q.size(1)), keys(k.size(1)),
        heads(q.size(2)) {
    if (v_) k_rope = mappable(*k_rope_), v = mappable(*v_);
    rope = v_ ? k_rope->size(2) : 64, nope = k.size(k.dim() - 1) - (v_ ? 0 : rope), value = v_ ? v->size(3) : nope;
    // where heads share the keys, tokens and heads are one dimension of rows
    if (shared && heads > 1 && queries > 1 && q.stride(1) != heads * q.stride(2)) q = torch::stable::contiguous(q);
    STD_TORCH_CHECK(queries * (shared ? heads : 1) < (1 << 30) && keys < (1 << 30), "mla: S H and T must each be below 2^30");
    a.cu = cu ? static_cast<const int*>(cu->const_data_ptr()) : nullptr;
    a.queries = int(queries), a.keys = int(keys), a.batch = int(batch), a.sequences = cu ? int(cu->size(0)) - 1 : 0;
    a.packed = int(shared ? heads : 1), a.apart = int(shared ? 1 : heads);
    a.offset = int(offset), a.causal = causal, a.scale = float(scale);
    a.padded = int((queries * a.packed + kPadded - 1) / kPadded * kPadded);
    // As many heads together as the cache holds, in parts of one size: the last one's long pieces would else come alone.
    const int64_t every = shared ? 1 : batch * heads, bytes = every * std::max(queries, keys) * (q.size(3) + value) * 2;
    const int64_t parts = std::clamp<int64_t>((bytes + kCache - 1) / kCache, 1, std::max<int64_t>(every, 1));
    a.together = shared ? int(batch) : int((every + parts - 1) / parts);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  }

  // [B, S, H, D] as boxes of `box` rows: (column, row, head apart, batch).
  TensorMap rows(const Tensor& t, int64_t box) const {
    const int64_t columns = t.size(3), of_row = shared && heads > 1 ? t.stride(2) : t.stride(1);
    return tensor_map<4>(
        "mla", t.const_data_ptr(), {columns, queries * a.packed, a.apart, batch}, {of_row, t.stride(2), t.stride(0)}, {64, box, 1, 1});
  }
  // Columns of [B, T, D] or [B, T, H, D], boxes of `box` keys.
  TensorMap columns(const Tensor& t, int64_t first, int64_t count, int64_t box) const {
    const bool of_heads = t.dim() == 4;
    return tensor_map<4>(
        "mla", static_cast<const char*>(t.const_data_ptr()) + 2 * first, {count, keys, of_heads ? heads : 1, batch},
        {t.stride(1), of_heads ? t.stride(2) : 0, t.stride(0)}, {64, box, 1, 1});
  }
  Maps maps(int64_t row_box, int64_t key_box) const {
    Maps m{};
    m.q = rows(q, row_box);
    m.nope = columns(k, 0, nope, key_box);
    m.rope = shared ? columns(k, nope, rope, key_box) : columns(*k_rope, 0, rope, key_box);
    if (v) m.v = columns(*v, 0, value, key_box);
    return m;
  }
  Tensor floats(std::vector<int64_t> sizes) const { return torch::stable::new_empty(q, sizes, ScalarType::Float); }
};

// Calls f with the element type and the shape.
template <typename F>
void with_kernels(const Problem& p, F f) {
  const auto with_element = [&](auto shape) {
    if (p.q.scalar_type() == ScalarType::BFloat16) f(BFloat16{}, shape);
    else if (p.q.scalar_type() == ScalarType::Half) f(Float16{}, shape);
    else STD_TORCH_CHECK(false, "mla: q must be bfloat16 or float16");
  };
  const auto is = [&](int64_t nope, int64_t rope, int64_t value, bool shared) {
    return p.nope == nope && p.rope == rope && p.value == value && p.shared == shared;
  };
  if (is(64, 64, 64, true)) with_element(Shape<64, 64, 64, true>{});
  else if (is(64, 64, 64, false)) with_element(Shape<64, 64, 64, false>{});
  else if (is(128, 64, 128, false)) with_element(Shape<128, 64, 128, false>{});
  else STD_TORCH_CHECK(false, "mla: no kernel for head dims ", p.nope, " + ", p.rope, " / ", p.value);
}

// Early: it may begin before the kernel before it has ended (device.cuh).
template <typename... Parameters, typename... Given>
void launch(void (*kernel)(Parameters...), const Problem& p, dim3 grid, int threads, size_t shared, bool early, Given... given) {
  if (grid.x == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization, overlap.val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = dim3(threads), how.dynamicSmemBytes = shared, how.stream = stream_of(p.q);
  how.attrs = &overlap, how.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&how, kernel, given...));
}
// Of the kernels whose blocks take piece after piece, one block a processor.
template <typename Kernel>
void launch_pieces(Kernel kernel, const Problem& p, int64_t pieces, int groups, size_t shared, const Maps& maps) {
  launch(kernel, p, dim3(unsigned(std::min<int64_t>(pieces, p.processors))), 128 * (groups + 1), shared, true, p.a, maps);
}

int64_t row_tiles(const Problem& p, int64_t size) {
  return (p.queries * p.a.packed + size - 1) / size * p.a.apart * p.batch;
}

}  // namespace
}  // namespace mla

std::tuple<Tensor, Tensor, Tensor> mla_forward(
    Tensor q, Tensor k, std::optional<Tensor> k_rope, std::optional<Tensor> v, std::optional<Tensor> cu_seqlens, double scale,
    bool causal, int64_t query_offset, bool save) {
  using namespace mla;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Problem p(q, k, k_rope, v, cu_seqlens, scale, causal, query_offset);
  Tensor out = torch::stable::new_empty(p.q, {p.batch, p.queries, p.heads, p.value});
  Tensor lse = p.floats({p.batch, p.queries, p.heads});
  Tensor rest = torch::stable::new_empty(p.q, {save ? p.batch : 0, p.queries, p.heads, p.value});
  if (lse.numel() == 0) return {out, lse, rest};
  Tensor taken = torch::stable::new_zeros(p.q, {1}, ScalarType::Int);
  p.a.out = out.mutable_data_ptr(), p.a.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.a.taken = static_cast<int*>(taken.mutable_data_ptr());
  p.a.rest = save ? rest.const_data_ptr() : nullptr;
  with_kernels(p, [&](auto element, auto shape) {
    using Sh = decltype(shape);
    using By = ForwardBy<Sh>;
    Maps maps{};
    if (p.keys) maps = p.maps(64 * By::GROUPS, By::KEYS);
    else maps.q = p.rows(p.q, 64 * By::GROUPS);
    maps.out = p.rows(out, 64);
    if (save) maps.rest = p.rows(rest, 64);
    launch_pieces(forward<decltype(element), Sh>, p, row_tiles(p, 64 * By::GROUPS), By::GROUPS, sizeof(ForwardShared<Sh, By>), maps);
  });
  return {out, lse, rest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mla_backward(
    std::optional<Tensor> dout, std::optional<Tensor> dlse, Tensor q, Tensor k, std::optional<Tensor> k_rope, std::optional<Tensor> v,
    Tensor out, Tensor lse, Tensor rest, std::optional<Tensor> cu_seqlens, double scale, bool causal, int64_t query_offset) {
  using namespace mla;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Problem p(q, k, k_rope, v, cu_seqlens, scale, causal, query_offset);
  out = dense(out), lse = dense(lse), rest = dense(rest), dlse = dense(dlse);
  Tensor grad = dout ? mappable(dense(*dout)) : torch::stable::new_zeros(out, {p.batch, p.queries, p.heads, p.value});
  Tensor facts = p.floats({2, p.batch, p.a.apart, p.a.padded});
  Tensor seen = torch::stable::new_empty(p.q, {p.a.padded, 2}, ScalarType::Int), taken = torch::stable::new_empty(p.q, {2}, ScalarType::Int);
  Tensor dq = torch::stable::new_empty(p.q, {p.batch, p.queries, p.heads, p.nope + p.rope});
  const auto like = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(p.q, sizes); };
  Tensor dk = p.shared ? like({p.batch, p.keys, p.nope + p.rope}) : like({p.batch, p.keys, p.heads, p.nope});
  Tensor dk_rope = p.shared ? like({0}) : like({p.batch, p.keys, p.rope});
  Tensor dv = p.shared ? like({0}) : like({p.batch, p.keys, p.heads, p.value});

  const auto address = [](const Tensor& t) { return static_cast<float*>(const_cast<void*>(t.const_data_ptr())); };
  p.a.lse = address(lse), p.a.out = const_cast<void*>(out.const_data_ptr()), p.a.rest = rest.const_data_ptr(), p.a.dout = grad.const_data_ptr();
  p.a.dlse = dlse ? address(*dlse) : nullptr;
  p.a.facts = address(facts), p.a.seen = static_cast<int2*>(seen.mutable_data_ptr());
  p.a.taken = static_cast<int*>(taken.mutable_data_ptr());
  with_kernels(p, [&](auto element, auto shape) {
    using T = decltype(element);
    using Sh = decltype(shape);
    using ByQueries = QueriesBy<Sh>;
    using ByKeys = KeysBy<Sh>;
    // Splits of the rows that see a block of keys: pieces enough that all processors have the same to do.
    const int64_t blocks = (p.keys + 64 * ByKeys::GROUPS - 1) / (64 * ByKeys::GROUPS) * p.batch * p.a.apart;
    const int64_t tiles = p.queries ? p.a.padded / ByKeys::ROWS : 1;
    p.a.splits = Sh::SHARED && blocks ? int(std::clamp<int64_t>(4 * p.processors / blocks, 1, std::min<int64_t>(tiles, 32))) : 1;
    if (p.q.numel() == 0) {
      for (Tensor* t : {&dk, &dk_rope, &dv}) torch::stable::zero_(*t);
      return;
    }
    Tensor partial = Sh::SHARED ? p.floats({p.a.splits, p.batch, p.keys, Sh::KEY}) : p.floats({p.batch, p.keys, p.heads, Sh::ROPE});
    p.a.partial = address(partial);
    const dim3 grid(unsigned(p.a.padded * (Sh::VALUE / 8) / (256 * kRowsOfThread)), unsigned(std::min<int64_t>(p.batch * p.a.apart, 65535)));
    launch(mla::rows<T, Sh>, p, grid, 256, 0, false, p.a);
    Maps maps{};
    if (p.keys) maps = p.maps(64 * ByQueries::GROUPS, ByQueries::KEYS);
    else maps.q = p.rows(p.q, 64 * ByQueries::GROUPS);
    maps.dout = p.rows(grad, 64 * ByQueries::GROUPS), maps.dq = p.rows(dq, 64);
    launch_pieces(queries<T, Sh>, p, row_tiles(p, 64 * ByQueries::GROUPS), ByQueries::GROUPS, sizeof(QueriesShared<Sh, ByQueries>), maps);
    if (p.keys == 0) return;
    maps = p.maps(ByKeys::ROWS, 64 * ByKeys::GROUPS);
    maps.dout = p.rows(grad, ByKeys::ROWS);
    if constexpr (!Sh::SHARED) maps.dnope = p.columns(dk, 0, Sh::NOPE, 64), maps.dv = p.columns(dv, 0, Sh::VALUE, 64);
    launch_pieces(keys<T, Sh>, p, blocks * p.a.splits, ByKeys::GROUPS, sizeof(KeysShared<Sh, ByKeys>), maps);
    Tensor& total = Sh::SHARED ? dk : dk_rope;
    const int64_t outer = Sh::SHARED ? 1 : p.batch * p.keys, quads = total.numel() / 4;
    launch(
        sums<T>, p, dim3(unsigned((quads + 255) / 256)), 256, 0, true, reinterpret_cast<const float4*>(p.a.partial),
        static_cast<uint2*>(total.mutable_data_ptr()), outer, int(Sh::SHARED ? p.a.splits : p.heads), quads / outer);
  });
  return {dq, dk, dk_rope, dv};
}

}  // namespace nam56r
