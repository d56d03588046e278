// The turns of a segment's chunks, for `walk`, which needs them in both directions, and `gradient`: cos and sin as Turns has
// them, a head's after a head's, from the revolutions before each chunk that the forward kept. The forward makes the same, bit
// for bit, as it goes: there several threads share an angle, here one has it, and sums in the same order.
// The segment is the one before `segment`, the next in line: this kernel is launched early, behind `gradient`. What it needs is
// older, and while the last blocks of that one run, SMs are free. Blocks of 128 threads; a block has a chunk, and of its heads
// those that are gridDim.x times 128 / N_a apart. Nothing is shared. Bound: issue, 17 instructions for each of B S H N_a angles.
#pragma once

#include "ssd/heads.cuh"

namespace nam56r::ssd {

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(128) turns(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  using Sh = Shape<T, MODEL, R, N>;
  using Angle = Angles<Sh>;
  constexpr int NA = Sh::NA, kHeads = 128 / NA, LONG = Angle::LONG, SEG = Angle::SEG;
  const Place here = place<Sh>(a, a.segment - a.segment_spans);
  const int index = threadIdx.x % NA, j = blockIdx.z, H = int(a.H), start = (here.chunk + j) * Sh::CT, live = here.seq.length - start;
  const int chunks = Sh::kTurns ? here.chunks : 0;
  const float* angles = at<const float>(a.angles) + here.seq.row * a.a_b + (here.seq.first + start) * a.a_s + index;
  const float* steps = at<const float>(a.DT) + here.seq.token + start;
  const float* bases = at<const float>(a.bases) + (here.span * a.every + j) * H * NA + index;
  Turns<Sh>* to = at<Turns<Sh>>(a.next_turns) + (blockIdx.y * a.every + j) * H;
  for (int h = blockIdx.x * kHeads + threadIdx.x / NA; h < H && j < chunks; h += gridDim.x * kHeads) {
    const float base = bases[h * NA];
    float sum[SEG][LONG], up_to[SEG];
#pragma unroll
    for (int s = 0; s < SEG; ++s) {
#pragma unroll
      for (int i = 0; i < LONG; ++i) {
        const int t = s * LONG + i;
        const float turned = t < live ? Angle::turned(angles[t * int(a.a_s) + h * a.a_h], steps[h * a.tokens + t]) : 0.f;
        sum[s][i] = i ? sum[s][i - 1] + turned : turned;
      }
      up_to[s] = sum[s][LONG - 1];
    }
#pragma unroll
    for (int d = 1; d < SEG; d *= 2)
#pragma unroll
      for (int s = SEG - 1; s >= d; --s) up_to[s] += up_to[s - d];
#pragma unroll
    for (int s = 0; s < SEG; ++s)
#pragma unroll
      for (int i = 0; i < LONG; ++i)
        to[h].x[s * LONG + i][Turns<Sh>::at(index)] = Angle::turn_of((s ? up_to[s - 1] + base : base) + sum[s][i]);
  }
  if (blockIdx.x + blockIdx.y + j == 0) wait_for_previous();  // what comes behind this kernel comes behind that one too
#endif
}

}  // namespace nam56r::ssd
