// Which scores of a row may be among its top_k, while they come: these are appended to the row's list. Keys come in rising order.
//
// A row has a histogram of its list, kSteps steps over somewhat more than the range of its first tile. From where top_k of the
// list lie above a step's lower edge, lower scores can't be among the top_k, and are passed over. So of scores in no order about
// top_k (1 + ln(keys / top_k)) come to the list. Where the range was no good, and the list becomes full, it is cut down to the
// top_k and a few more (cut, select.cuh), and the histogram begins anew over what is left.
// A warp has a row: 32 keys at once.
#pragma once

#include "dsa/select.cuh"

namespace nam56r::dsa {

constexpr int kSteps = 128;

// least: the lowest score that may still be among the top_k. A score lies in step (score - low) per_step; below 0, not known yet.
struct alignas(16) Row {
  float least, low, per_step;
  int count, next;  // with `next` in the list, least is looked for again
  int first, end;   // the keys that the row sees
  unsigned steps[kSteps / 2];  // two counts in each
};

// With so many more in a list of `count`, least is looked for again.
__device__ inline int again_with(int count, int top_k) { return count + top_k / 8 + 16; }

// Of 32 keys, as bits, the first `count`.
__device__ inline unsigned below(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

__device__ inline void count_in(Row& row, float score, float low, float per_step) {
  const unsigned step = min(__float2uint_rz((score - low) * per_step), unsigned(kSteps - 1));  // 0 of what is below, or NaN
  atomicAdd(&row.steps[step / 2], 1u << step % 2 * 16);
}

// The histogram anew, over [low, high]: empty.
__device__ inline float begin(Row& row, float low, float high) {
  for (int i = threadIdx.x % 32; i < kSteps / 2; i += 32) row.steps[i] = 0;
  __syncwarp();
  const float per_step = kSteps / (high - low);
  return per_step > 0.f && per_step < infinity() ? per_step : 0.f;  // all in step 0, where all are alike or some infinite
}

// least, or more if the histogram says so.
__device__ inline float raised(const Row& row, float least, float low, float per_step, int top_k) {
  const int lane = threadIdx.x % 32;
  int mine[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) mine[2 * i] = row.steps[2 * lane + i] & 0xffff, mine[2 * i + 1] = row.steps[2 * lane + i] >> 16;
  const int sum = mine[0] + mine[1] + mine[2] + mine[3];
  const int up_to = from_lane_on(sum);
  const int owner = 31 - __clz(__ballot_sync(~0u, up_to >= top_k));
  if (owner < 0) return least;
  int step = 4 * lane, left = up_to - top_k;  // the highest step with top_k at it or above
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    left -= mine[i];
    if (left >= 0) step = 4 * lane + i + 1;
  }
  step = __shfl_sync(~0u, step, owner);
  if (step == 0 || per_step == 0.f) return least;
  // nothing that was counted at the step or above lies below this: what rounding there and here may be
  const float edge = low + float(step) / per_step;
  return fmaxf(least, edge - 1e-3f / per_step - (fabsf(low) + fabsf(edge)) * 0x1p-21f);
}

// A tile's scores of the keys from `key` on.
template <int KEYS>
__device__ inline void take(const float* score, int key, Row& row, uint2* list, const Arguments& a, bool odd, Bins& bins) {
  const int lane = threadIdx.x % 32, first = row.first - key, end = row.end - key;
  if (end <= 0 || first >= KEYS) return;
  float least = row.least;
  float x[KEYS / 32];
  unsigned passing[KEYS / 32], any = 0;
#pragma unroll
  for (int i = 0; i < KEYS / 32; ++i) {
    x[i] = score[32 * i + lane];
    passing[i] = __ballot_sync(~0u, x[i] >= least);
  }
  if (odd || first > 0 || end < KEYS) {
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
      const unsigned seen = below(end - 32 * i) & ~below(first - 32 * i);
      passing[i] &= seen;
      if (x[i] != x[i] && seen >> lane & 1) *a.status = 1;
    }
  }
#pragma unroll
  for (int i = 0; i < KEYS / 32; ++i) any |= passing[i];
  if (!any) return;
  float low = row.low, per_step = row.per_step;
  int count = row.count;
  if (per_step < 0.f) {
    unsigned lowest = ~0u, highest = 0;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i)
      if (passing[i] >> lane & 1) lowest = min(lowest, ordered(x[i])), highest = max(highest, ordered(x[i]));
    low = unordered(__reduce_min_sync(~0u, lowest));
    const float high = unordered(__reduce_max_sync(~0u, highest));
    per_step = begin(row, low, high + .75f * (high - low));
  }
#pragma unroll
  for (int i = 0; i < KEYS / 32; ++i) {
    if (!passing[i]) continue;
    if (passing[i] >> lane & 1) {
      list[count + __popc(passing[i] & below(lane))] = {ordered(x[i]), unsigned(key + 32 * i + lane)};
      count_in(row, x[i], low, per_step);
    }
    count += __popc(passing[i]);
  }
  __syncwarp();
  int next = row.next;
  if (count >= next) least = raised(row, least, low, per_step, a.top_k), next = again_with(count, a.top_k);
  if (count > a.capacity - KEYS) {
    const Cut at = cut<32>(Listed<4>{list, count}, a.top_k, a.top_k + a.top_k / 8, bins);
    count = keep_above(Listed<4>{list, count}, at, [&](int place, unsigned u, unsigned of) { list[place] = {u, of}; });
    __syncwarp();
    least = unordered(at.from + 1);  // a later score as high as the lowest of top_k loses to it: its key is larger
    low = unordered(at.from);
    const float high = unordered(at.highest);
    per_step = begin(row, low, high + (high - low));
    Listed<4>{list, count}([&](unsigned u, unsigned, unsigned v, unsigned) {
      if (u) count_in(row, unordered(u), low, per_step);
      if (v) count_in(row, unordered(v), low, per_step);
    });
    next = again_with(count, a.top_k);
  }
  __syncwarp();
  if (lane == 0) row.least = least, row.low = low, row.per_step = per_step, row.count = count, row.next = next;
  __syncwarp();
}

}  // namespace nam56r::dsa
