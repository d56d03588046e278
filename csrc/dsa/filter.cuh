// Which scores of a row may be among its top_k, while they come: these are appended to the row's list. Keys come in rising order.
//
// A row has a histogram of its list, kSteps steps over somewhat more than the range of its first tile. From where top_k of the
// list lie above a step's lower edge, lower scores can't be among the top_k, and are passed over. So of scores in no order about
// top_k (1 + ln(keys / top_k)) come to the list. Where the range was no good, and the list becomes full, it is cut down to the
// top_k and a few more (cut, select.cuh), and the histogram begins anew over what is left.
// A warp has up to four rows, eight lanes each for what is known of it and for the tile's words of 32 keys. It compares 32 keys of a
// row at once, all rows' before anything that depends on them: beside products every instruction waits long for the one before it.
#pragma once

#include "dsa/select.cuh"

namespace nam56r::dsa {

constexpr int kSteps = 128;

struct alignas(16) Steps {
  unsigned pair[kSteps / 2];  // two counts in each
};

// With so many more in a list of `count`, least is looked for again.
__device__ inline int again_with(int count, int top_k) { return count + top_k / 8 + 16; }

// Of 32 keys, as bits, the first `count`.
__device__ inline unsigned below(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

__device__ inline void count_in(Steps& steps, float score, float low, float per_step) {
  const unsigned step = min(__float2uint_rz((score - low) * per_step), unsigned(kSteps - 1));  // 0 of what is below, or NaN
  atomicAdd(&steps.pair[step / 2], 1u << step % 2 * 16);
}

// The histogram anew, over [low, high]: empty.
__device__ inline float begin(Steps& steps, float low, float high) {
  for (int i = threadIdx.x % 32; i < kSteps / 2; i += 32) steps.pair[i] = 0;
  __syncwarp();
  const float per_step = kSteps / (high - low);
  return per_step > 0.f && per_step < infinity() ? per_step : 0.f;  // all in step 0, where all are alike or some infinite
}

// What top_k of the list aren't below, by its histogram.
__device__ inline float bound_of(const Steps& steps, float low, float per_step, int top_k) {
  const int lane = threadIdx.x % 32;
  int mine[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) mine[2 * i] = steps.pair[2 * lane + i] & 0xffff, mine[2 * i + 1] = steps.pair[2 * lane + i] >> 16;
  const int sum = mine[0] + mine[1] + mine[2] + mine[3];
  const int up_to = from_lane_on(sum);
  const int owner = 31 - __clz(__ballot_sync(~0u, up_to >= top_k));
  if (owner < 0) return -infinity();
  int step = 4 * lane, left = up_to - top_k;  // the highest step with top_k at it or above
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    left -= mine[i];
    if (left >= 0) step = 4 * lane + i + 1;
  }
  step = __shfl_sync(~0u, step, owner);
  if (step == 0 || per_step == 0.f) return -infinity();
  // nothing that was counted at the step or above lies below this: what rounding there and here may be
  const float edge = low + float(step) / per_step;
  return edge - 1e-3f / per_step - (fabsf(low) + fabsf(edge)) * 0x1p-21f;
}

// The rows of a warp. A lane knows of row lane / 8. A score lies in step (score - low) per_step; below 0, not known yet.
template <int ROWS>
struct Rows {
  static_assert(ROWS <= 4);
  Steps* steps;
  uint2* lists;
  float least, low, per_step;  // least: the lowest score that may still be among the top_k
  int count, next;             // with `next` in the list, least is looked for again
  int first, end;              // the keys that the row sees

  __device__ Rows(const Arguments& a, Steps* steps, uint2* lists, int query, int past)
      : steps(steps), lists(lists), least(-infinity()), low(0.f), per_step(-1.f), count(0), next(again_with(a.top_k, a.top_k)) {
    const int row = threadIdx.x % 32 / 8;
    const Seen seen = seen_by(a, min(query + row, a.length - 1));
    first = seen.first, end = row < ROWS && query + row < past ? seen.end : 0;
  }

  // f(row), the whole warp for each row whose lanes ask.
  template <class F>
  __device__ __forceinline__ void for_rows(bool asks, F f) {
    for (unsigned left = __ballot_sync(~0u, asks); left;) {
      const int r = (__ffs(left) - 1) / 8;
      left &= ~(0xffu << 8 * r);
      f(r);
    }
  }

  // A tile's scores of the keys from `key` on.
  template <int KEYS, int PITCH>
  __device__ void take(const float (*score)[PITCH], int key, const Arguments& a, bool odd, Bins& bins) {
    constexpr int WORDS = KEYS / 32, kFew = 12;
    static_assert(WORDS <= 8);
    const int lane = threadIdx.x % 32, row = lane / 8, word = lane % 8;
    unsigned passing = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float bound = __shfl_sync(~0u, least, 8 * r);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const unsigned which = __ballot_sync(~0u, score[r][32 * i + lane] >= bound);
        if (lane == 8 * r + i) passing = which;
      }
    }
    const unsigned seen = below(end - key - 32 * word) & ~below(first - key - 32 * word);
    passing &= seen;
    if (odd) {
#pragma unroll 1
      for (int i = 0; i < ROWS * 8; ++i) {
        const unsigned which = __shfl_sync(~0u, seen, i);
        if (i % 8 >= WORDS || !(which >> lane & 1)) continue;
        const float x = score[i / 8][32 * (i % 8) + lane];
        if (x != x) *a.status = 1;
      }
    }
    if (!__any_sync(~0u, passing)) return;

    for_rows(per_step < 0.f && passing, [&](int r) {
      unsigned lowest = ~0u, highest = 0;
      for (int i = 0; i < WORDS; ++i) {
        const unsigned u = ordered(score[r][32 * i + lane]);
        if (__shfl_sync(~0u, passing, 8 * r + i) >> lane & 1) lowest = min(lowest, u), highest = max(highest, u);
      }
      const float from = unordered(__reduce_min_sync(~0u, lowest)), to = unordered(__reduce_max_sync(~0u, highest));
      const float each = begin(steps[r], from, to + .75f * (to - from));
      if (row == r) low = from, per_step = each;
    });
    const int own = __popc(passing);
    int at = own;  // of the row's, up to this word
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
      const int more = __shfl_up_sync(~0u, at, d, 8);
      if (word >= d) at += more;
    }
    const int all = __shfl_sync(~0u, at, 7, 8);
    at += count - own, count += all;
    if (__reduce_max_sync(~0u, unsigned(own)) <= kFew) {  // each lane appends its word's
      while (__any_sync(~0u, passing)) {
        if (passing) {
          const int i = 32 * word + __ffs(passing) - 1;
          const float x = score[row][i];
          lists[row * a.capacity + at++] = {ordered(x), unsigned(key + i)};
          count_in(steps[row], x, low, per_step);
          passing &= passing - 1;
        }
      }
    } else {  // a word after the other
#pragma unroll 1
      for (int r = 0; r < ROWS; ++r) {
        const float from = __shfl_sync(~0u, low, 8 * r), each = __shfl_sync(~0u, per_step, 8 * r);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          const unsigned which = __shfl_sync(~0u, passing, 8 * r + i);
          const int place = __shfl_sync(~0u, at, 8 * r + i) + __popc(which & below(lane));
          if (which >> lane & 1) {
            const float x = score[r][32 * i + lane];
            lists[r * a.capacity + place] = {ordered(x), unsigned(key + 32 * i + lane)};
            count_in(steps[r], x, from, each);
          }
        }
      }
    }
    __syncwarp();
    for_rows(count >= next, [&](int r) {
      const float x = bound_of_row(r, a.top_k);
      if (row == r) least = fmaxf(least, x), next = again_with(count, a.top_k);
    });
    for_rows(count > a.capacity - KEYS, [&](int r) { thin(r, a, bins); });
  }

  // What is to be known of each row's list in the end. least is about later scores: an earlier one may be equal to what they lose to.
  __device__ void finish(int2* counts, int top_k) {
    const int row = threadIdx.x % 32 / 8;
    float bound = -infinity();
    for_rows(count > top_k, [&](int r) {
      const float x = bound_of_row(r, top_k);
      if (row == r) bound = x;
    });
    if (threadIdx.x % 8 == 0 && row < ROWS) counts[row] = {count, int(ordered(bound))};
  }

  __device__ float bound_of_row(int r, int top_k) const {
    return bound_of(steps[r], __shfl_sync(~0u, low, 8 * r), __shfl_sync(~0u, per_step, 8 * r), top_k);
  }

  // The list cut down to the top_k and a few more.
  __device__ void thin(int r, const Arguments& a, Bins& bins) {
    uint2* list = lists + r * a.capacity;
    int left = __shfl_sync(~0u, count, 8 * r);
    const Cut at = cut(Listed<4>{list, left}, a.top_k, a.top_k + a.top_k / 8, bins);
    left = keep_above(Listed<4>{list, left}, at, [&](int place, unsigned u, unsigned of) { list[place] = {u, of}; });
    __syncwarp();
    const float from = unordered(at.from), to = unordered(at.highest), each = begin(steps[r], from, to + (to - from));
    Listed<4>{list, left}([&](unsigned u, unsigned, unsigned v, unsigned) {
      if (u) count_in(steps[r], unordered(u), from, each);
      if (v) count_in(steps[r], unordered(v), from, each);
    });
    __syncwarp();
    if (threadIdx.x % 32 / 8 == r) {
      least = unordered(at.from + 1);  // a later score as high as the lowest of top_k loses to it: its key is larger
      low = from, per_step = each, count = left, next = again_with(left, a.top_k);
    }
  }
};

}  // namespace nam56r::dsa
