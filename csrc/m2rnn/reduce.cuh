// What: adds the partial gradients of products.cuh in a fixed order and rounds them: dq and dk over the groups of heads that
//   share them, dweight over the units.
// Shapes: dq [B, S, Hq, K], dk [B, S, Hk, K], dweight [H, V, V] fp32; parts as in products.cuh.
// Tiling: a thread has one result. Bound: memory, and launch latency.
#pragma once

#include "m2rnn/recurrence.cuh"

namespace nam56r::m2rnn {

struct ReduceArguments {
  Inputs in;
  const float *dq_parts, *dk_parts, *dweight_parts;
  void *dq, *dk;
  float* dweight;
  long long rows, units;  // B * S; units that may be numbered
  int groups, chunk, columns, row_blocks;
};

// The sum of key `key` at row s of batch row b over `count` groups from `first` on.
__device__ inline float sum_groups(
    const ReduceArguments& a, const float* parts, int batch, int row, int key, int first, int count) {
  const auto starts = [&](int index) { return a.in.cu_seqlens[index] <= row; };
  const int index = a.in.cu_seqlens ? last_sequence(a.in, starts) : batch;
  const int steps = a.chunk * kUnit, run = min(a.chunk, 8);
  const Sequence units = sequence_number(a.in, index, steps);
  const int step = max(row - units.begin, 0), j = step % run;
  const int lane = key % 8 * 4 + j / 2, element = key % 16 / 8 * 2 + j % 2, run_floats = a.row_blocks * 128;
  const long long group_floats = (long long)(steps / run) * run_floats;
  const float* from = parts + ((units.chunk + step / steps) * a.groups + first) * group_floats +
                      step % steps / run * run_floats + (key / 16 * 32 + lane) * 4 + element;
  float sum = 0;
  for (int group = 0; group < count; ++group) sum += from[group * group_floats];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(256) reduce(const ReduceArguments a) {
  const Inputs& in = a.in;
  long long at = blockIdx.x * 256ll + threadIdx.x;
  const int square = a.columns * a.columns;
  const long long weights = (long long)in.heads * square;
  if (at < weights) {
    float sum = 0;
#pragma unroll 8
    for (long long unit = 0; unit < a.units; ++unit) sum += a.dweight_parts[unit * weights + at];
    a.dweight[at] = sum;
    return;
  }
  at -= weights;
  const int query_heads = in.heads / in.heads_a_query, key_heads = in.heads / in.heads_a_key;
  const bool is_key = at >= a.rows * query_heads * in.keys;
  if (is_key) at -= a.rows * query_heads * in.keys;
  const int heads = is_key ? key_heads : query_heads;
  if (at >= a.rows * heads * in.keys) return;
  const int key = at % in.keys, head = at / in.keys % heads, each = a.groups / heads;
  const long long row = at / in.keys / heads;
  const float sum = sum_groups(
      a, is_key ? a.dk_parts : a.dq_parts, int(row / in.length), int(row % in.length), key, head * each, each);
  put(static_cast<T*>(is_key ? a.dk : a.dq) + at, sum);
}

}  // namespace nam56r::m2rnn
