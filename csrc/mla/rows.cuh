// Attention, backward, first: what the other kernels need of every row, Arguments::facts and seen; and no piece of theirs is taken.
//
// VALUE / 8 lanes a row, 16 bytes of out and of dout each. Bound: memory, out and dout read once.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

template <typename T, class Sh>
__global__ void __launch_bounds__(256) rows(const __grid_constant__ Arguments a) {
  constexpr int LANES = Sh::VALUE / 8;
  const int count = a.queries * a.packed, heads = a.packed * a.apart, lane = threadIdx.x % LANES;
  const int row = blockIdx.x * (256 / LANES) + threadIdx.x / LANES;
  if (row >= a.padded) return;
  if (blockIdx.y == 0 && lane == 0) {
    const Seen seen = seen_by(a, min(row, count - 1) / a.packed);
    a.seen[row] = {seen.first, seen.end};
    if (row < 2) a.taken[row] = 0;
  }
  const bool there = row < count;
  for (int block = blockIdx.y; block < a.batch * a.apart; block += gridDim.y) {
    const int of = min(row, count - 1);
    const long long from = ((long long)(block / a.apart) * a.queries + of / a.packed) * heads + block % a.apart + of % a.packed;
    const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.out) + from * Sh::VALUE + lane * 8);
    const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.dout) + from * Sh::VALUE + lane * 8);
    const float lse = there ? a.lse[from] : -infinity(), more = a.dlse ? a.dlse[from] : 0.f;
    const unsigned xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = Pair<T>::unpack(xs[i]), v = Pair<T>::unpack(ys[i]);
      sum += u.x * v.x + u.y * v.y;
    }
#pragma unroll
    for (int i = 1; i < LANES; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0) {
      float* to = a.facts + (long long)block * a.padded + row;
      to[0] = lse > -infinity() ? lse * LOG2_E : infinity();
      to[(long long)a.batch * a.apart * a.padded] = lse > -infinity() ? (sum - more) * a.scale : 0.f;
    }
  }
}

}  // namespace nam56r::mla
