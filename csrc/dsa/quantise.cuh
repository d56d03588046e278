// 16-bit rows as e4m3 with a scale each: the power of two by which the row's largest is at most 448, so that only the rounding to
// e4m3's three bits loses anything. A row with what isn't finite has the scale NaN, and so have its scores.
//
// Tiling: a thread has 16 features, D / 16 threads a row. Bound: memory.
#pragma once

#include "hopper/device.cuh"

namespace nam56r::dsa {

constexpr int kQuantising = 256;

// 2^e for the least e by which |x| <= 448 2^e; 1 for 0.
__device__ inline float scale_of(float largest) {
  if (largest == 0.f) return 1.f;
  if (!(largest < infinity())) return __int_as_float(0x7fffffff);
  const unsigned bits = __float_as_uint(largest);
  const int e = int(bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);  // 448 = 1.75 2^8
  return __uint_as_float(unsigned(max(e, -126) + 127) << 23);
}

// x [rows / heads, heads, D] -> to [rows / heads, padded, D], of which the heads past x's stay as they are; scales [rows], times weights
// if there are any.
template <typename T, int D>
__global__ void __launch_bounds__(kQuantising)
    quantise(const T* x, unsigned char* to, float* scales, const float* weights, long long rows, int heads, int padded) {
#if NAM56R_HOPPER
  constexpr int THREADS = D / 16;
  const int lane = threadIdx.x % THREADS;
  const unsigned together = ((1u << THREADS) - 1) << (threadIdx.x % 32 - lane);
  const long long step = (long long)gridDim.x * (kQuantising / THREADS);
  for (long long row = (blockIdx.x * (long long)kQuantising + threadIdx.x) / THREADS; row < rows; row += step) {
    const uint4* from = reinterpret_cast<const uint4*>(x + row * D) + 2 * lane;
    const uint4 parts[2] = {from[0], from[1]};
    float2 values[8];
    float largest = 0.f;
    bool odd = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = Pair<T>::unpack(reinterpret_cast<const unsigned*>(parts)[i]);
      odd = odd || values[i].x != values[i].x || values[i].y != values[i].y;
      largest = fmaxf(largest, fmaxf(fabsf(values[i].x), fabsf(values[i].y)));
    }
    if (odd) largest = infinity();
#pragma unroll
    for (int d = 1; d < THREADS; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(together, largest, d));
    const float scale = scale_of(largest), by = 1.f / scale;
    unsigned out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned short low, high;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[2 * i].y * by), "f"(values[2 * i].x * by));
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[2 * i + 1].y * by), "f"(values[2 * i + 1].x * by));
      out[i] = low | unsigned(high) << 16;
    }
    const long long place = row / heads * padded + row % heads;
    reinterpret_cast<uint4*>(to + place * D)[lane] = {out[0], out[1], out[2], out[3]};
    if (lane == 0) scales[row] = weights ? weights[row] * scale : scale;
  }
#endif
}

}  // namespace nam56r::dsa
