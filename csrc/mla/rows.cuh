// Attention, backward, first: what the other kernels need of every row, Arguments::facts and seen; and no piece of theirs is taken.
//
// VALUE / 8 lanes a row, 16 bytes of out, of what its rounding lost, and of dout each: where a row's weights are nearly one key's, dP
// and the sum of P dP are nearly equal, and what out's rounding lost is as large as their difference. Bound: memory, all read once.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

constexpr int kRowsOfThread = 2;

template <typename T, class Sh>
__global__ void __launch_bounds__(256) rows(const __grid_constant__ Arguments a) {
#if NAM56R_HOPPER
  release_next();
  constexpr int LANES = Sh::VALUE / 8, APART = 256 / LANES, EACH = kRowsOfThread;
  const int count = a.queries * a.packed, lane = threadIdx.x % LANES;
  const int first = blockIdx.x * (APART * EACH) + threadIdx.x / LANES;
  if (blockIdx.y == 0 && lane == 0) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int row = first + e * APART;
      const Seen seen = seen_by(a, min(row, count - 1) / a.packed);
      a.seen[row] = {seen.first, seen.end};
      if (row < 2) a.taken[row] = 0;
    }
  }
  for (int block = blockIdx.y; block < a.batch * a.apart; block += gridDim.y) {
    const long long of_block = (long long)(block / a.apart) * count * a.apart + block % a.apart;
    long long from[EACH];
    uint4 out[EACH], rest[EACH], dout[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      from[e] = of_block + (long long)min(first + e * APART, count - 1) * a.apart;
      const auto of = [&](const void* t) { return static_cast<const uint4*>(t) + from[e] * LANES + lane; };
      out[e] = __ldcs(of(a.out)), rest[e] = __ldcs(of(a.rest)), dout[e] = *of(a.dout);
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const unsigned xs[4] = {out[e].x, out[e].y, out[e].z, out[e].w}, zs[4] = {rest[e].x, rest[e].y, rest[e].z, rest[e].w};
      const unsigned ys[4] = {dout[e].x, dout[e].y, dout[e].z, dout[e].w};
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = Pair<T>::unpack(xs[i]), y = Pair<T>::unpack(ys[i]), z = Pair<T>::unpack(zs[i]);
        sum += (x.x + z.x) * y.x + (x.y + z.y) * y.y;
      }
#pragma unroll
      for (int i = 1; i < LANES; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (lane == 0) {
        const int row = first + e * APART;
        const float lse = row < count ? a.lse[from[e]] : -infinity(), more = a.dlse ? a.dlse[from[e]] : 0.f;
        float* to = a.facts + (long long)block * a.padded + row;
        to[0] = lse > -infinity() ? lse * LOG2_E : infinity();
        to[(long long)a.batch * a.apart * a.padded] = lse > -infinity() ? (sum - more) * a.scale : 0.f;
      }
    }
  }
#endif
}

}  // namespace nam56r::mla
