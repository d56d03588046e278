// Sums over the lanes that share a row or a column of accumulators, and sums in memory.
//
// Of accumulators [16][8] a warp's lane 4 g + t has the columns 2 t, 2 t + 1 of the rows g and g + 8.
#pragma once

namespace nam56r::ssd {

// Adds without waiting; one thread of a launch has an address, so there is one order.
__device__ inline void add(float* to, float x, bool really = true) {
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p red.global.add.f32 [%0], %1;\n}" :: "l"(to), "f"(x), "r"(int(really)) : "memory");
}

__device__ inline void add(float* to, float2 x) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(to), "f"(x.x), "f"(x.y) : "memory");
}

// Two lanes, `apart` from each other, add half of v each: the lower one the first half. Without halves both add all.
template <int half, int n>
__device__ __forceinline__ void exchange(float (&v)[n], int apart) {
  const bool high = threadIdx.x & apart;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float keep = high ? v[i + half] : v[i], send = high ? v[i] : v[i + half];
    v[i] = keep + __shfl_xor_sync(~0u, send, apart);
  }
  if (half == 0) v[0] += __shfl_xor_sync(~0u, v[0], apart);
}

// Sums v[i] over the eight lanes of a column; gives the one of number folded<n>().
template <int n>
__device__ __forceinline__ float fold(float (&v)[n]) {
  static_assert(n <= 8);
  exchange<n / 2>(v, 16), exchange<n / 4>(v, 8), exchange<n / 8>(v, 4);
  return v[0];
}
template <int n>
__device__ inline int folded() { return threadIdx.x % 32 / 4 / (8 / n); }

// Sums v[i] over the four lanes of a row; leaves the n / 4 from over_row_first<n>() on.
template <int n>
__device__ __forceinline__ void over_row(float (&v)[n]) { exchange<n / 2>(v, 2), exchange<n / 4>(v, 1); }
template <int n>
__device__ inline int over_row_first() { return (threadIdx.x & 2 ? n / 2 : 0) + (threadIdx.x & 1 ? n / 4 : 0); }

__device__ inline float over_warp(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

__device__ inline float over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace nam56r::ssd
