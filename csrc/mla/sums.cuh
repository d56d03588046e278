// Attention, backward, last: partial sums in fp32 [outer, parts, inner] are added up in their order, to 16 bits [outer, inner].
// Four elements a thread. Bound: memory.
#pragma once

#include "mla/arguments.cuh"

namespace nam56r::mla {

template <typename T>
__global__ void __launch_bounds__(256) sums(const float4* from, uint2* to, long long outer, int parts, long long inner) {
#if NAM56R_HOPPER
  wait_for_previous();
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  if (at >= outer * inner) return;
  from += at / inner * parts * inner + at % inner;
  float4 sum = from[0];
  for (int part = 1; part < parts; ++part) {
    const float4 x = from[part * inner];
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  to[at] = {Pair<T>::pack(sum.x, sum.y), Pair<T>::pack(sum.z, sum.w)};
#endif
}

}  // namespace nam56r::mla
