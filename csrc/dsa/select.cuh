// The exact top_k of a list of candidates, by a warp.
//
// The k-th best is found by histograms: kBins bins between the lowest and the highest score, then as many inside the bin that it
// is in, until what is at or above the bin is few enough, or what is in it fits a warp's lanes, which then look for it bit by
// bit. So scores are read two or three times, whatever they are; four histograms distinguish all 2^32 numbers.
// A list is in the order of its keys, and stays so: of equal scores the first are taken, and the result needs no sorting.
#pragma once

#include "dsa/arguments.cuh"

namespace nam56r::dsa {

constexpr int kBins = 256, kBinBits = 8;

// Scores as numbers of the same order, 0 and -0 as one; none is 0. And back.
__device__ inline unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.f);
  return bits ^ (unsigned(int(bits) >> 31) | 0x80000000u);
}
__device__ inline float unordered(unsigned u) { return __uint_as_float(u >> 31 ? u ^ 0x80000000u : ~u); }

// A list in memory, read by a warp, two entries a lane and AHEAD times 64 at once: f(score, key, the next score, its key), in order.
// Scores are 0 past the end. kPlaces: f gets places in the list instead of keys.
template <int AHEAD, bool kPlaces = false>
struct Listed {
  const uint2* list;
  int count;

  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
    for (int from = 0; from < count; from += 64 * AHEAD) {
      uint4 x[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int at = from + i * 64 + threadIdx.x % 32 * 2;
        x[i] = at < count ? *reinterpret_cast<const uint4*>(list + at) : uint4{0, 0, 0, 0};
        if (at + 1 >= count) x[i].z = 0;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const unsigned at = from + i * 64 + threadIdx.x % 32 * 2;
        f(x[i].x, kPlaces ? at : x[i].y, x[i].z, kPlaces ? at + 1 : x[i].w);
      }
    }
  }
};

// Scores in shared memory, read in the same way: f(score, its place, the next score, its place).
struct Staged {
  const unsigned* score;
  int count;

  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
    for (int from = 0; from < count; from += 64) {
      const int at = from + threadIdx.x % 32 * 2;
      uint2 x = at < count ? *reinterpret_cast<const uint2*>(score + at) : uint2{0, 0};
      if (at + 1 >= count) x.y = 0;
      f(x.x, unsigned(at), x.y, unsigned(at + 1));
    }
  }
};

// The lane, to the compiler another one every time: or it keeps all that is made of it, and spills what is needed at every tile.
__device__ inline int lane_anew() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The sum of x over this lane and those above it.
__device__ inline int from_lane_on(int x) {
  const int lane = lane_anew();
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int more = __shfl_down_sync(~0u, x, d);
    if (lane + d < 32) x += more;
  }
  return x;
}

// What a warp needs to find a cut.
struct alignas(16) Bins {
  int count[kBins];
  int filled;
};

// The scores above `from` are fewer than k; those at it, of which the first `alike` count, make them k or up to `most`.
struct Cut {
  unsigned from, highest;
  int alike;
};
constexpr int kAll = 1 << 30;

// Of scores(f), as above. All lanes find the same.
template <class Scores>
__device__ inline Cut cut(const Scores& scores, int k, int most, Bins& bins) {
  constexpr int MINE = kBins / 32;
  const int lane = lane_anew();
  unsigned low = ~0u, high = 0;
  // 0 counts for neither
  scores([&](unsigned u, unsigned, unsigned v, unsigned) { low = min(low, min(u - 1, v - 1)), high = max(high, max(u, v)); });
  low = __reduce_min_sync(~0u, low) + 1, high = __reduce_max_sync(~0u, high);
  const unsigned highest = high;
  for (int above = 0;;) {
    const int shift = max(0, 32 - __clz(high - low) - kBinBits);
    for (int i = lane; i < kBins; i += 32) bins.count[i] = 0;
    if (lane == 0) bins.filled = 0;
    __syncwarp();
    scores([&](unsigned u, unsigned, unsigned v, unsigned) {
      if (u >= low && u <= high) atomicAdd(&bins.count[(u - low) >> shift], 1);
      if (v >= low && v <= high) atomicAdd(&bins.count[(v - low) >> shift], 1);
    });
    __syncwarp();
    int sum = 0, mine[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) mine[i] = bins.count[lane * MINE + i], sum += mine[i];
    const int up_to = from_lane_on(sum);
    const int owner = 31 - __clz(__ballot_sync(~0u, above + up_to >= k));
    int bin = 0, here = 0, before = above + up_to - sum;  // above the bin that the k-th is in
    bool found = false;
#pragma unroll
    for (int i = MINE - 1; i >= 0; --i) {
      const bool is = !found && before + mine[i] >= k;
      if (is) bin = lane * MINE + i, here = mine[i];
      found = found || is;
      if (!found) before += mine[i];
    }
    bin = __shfl_sync(~0u, bin, owner), here = __shfl_sync(~0u, here, owner), above = __shfl_sync(~0u, before, owner);
    low += unsigned(bin) << shift;
    if (above + here <= most) return {low, highest, kAll};
    if (shift == 0) return {low, highest, k - above};
    high = low + min(high - low, (1u << shift) - 1);
    __syncwarp();  // all have read the bins
    if (here > 32) continue;
    const auto collect = [&](unsigned u) {
      if (u >= low && u <= high) bins.count[atomicAdd(&bins.filled, 1)] = int(u - low);
    };
    scores([&](unsigned u, unsigned, unsigned v, unsigned) { collect(u), collect(v); });
    __syncwarp();
    const unsigned own = lane < here ? unsigned(bins.count[lane]) : 0u;
    unsigned from = 0;
    for (int bit = shift - 1; bit >= 0; --bit)
      if (__popc(__ballot_sync(~0u, lane < here && own >= (from | 1u << bit))) >= k - above) from |= 1u << bit;
    const int higher = __popc(__ballot_sync(~0u, lane < here && own > from));
    return {low + from, highest, k - above - higher};
  }
}

// What the cut leaves of a warp's entries, in order: f(place among them, score, what comes with it). Gives how many.
template <class Entries, class F>
__device__ __forceinline__ int keep_above(const Entries& entries, const Cut& cut, F f) {
  const unsigned before = (1u << threadIdx.x % 32) - 1;
  int kept = 0, alike = cut.alike;
  entries([&](unsigned u, unsigned of_u, unsigned v, unsigned of_v) {
    bool first = u >= cut.from, second = v >= cut.from;
    if (cut.alike != kAll) {
      const unsigned same = __ballot_sync(~0u, u == cut.from), others = __ballot_sync(~0u, v == cut.from);
      const int rank = __popc(same & before) + __popc(others & before);
      first = u > cut.from || (u == cut.from && rank < alike);
      second = v > cut.from || (v == cut.from && rank + (u == cut.from) < alike);
      alike -= __popc(same) + __popc(others);
    }
    const unsigned firsts = __ballot_sync(~0u, first), seconds = __ballot_sync(~0u, second);
    const int place = kept + __popc(firsts & before) + __popc(seconds & before);
    if (first) f(place, u, of_u);
    if (second) f(place + first, v, of_v);
    kept += __popc(firsts) + __popc(seconds);
  });
  return kept;
}

// A warp has a row: the top_k's keys, then -1. Of its list, what isn't below `least` is read into shared memory, if there is room for
// it. Bound: latency, which the other warps of the processor hide.
constexpr int kSelecting = 128;

// Of a warp: room for somewhat more than top_k scores, and for their places in the list.
struct Room {
  int entries;
  __host__ __device__ explicit Room(int top_k) : entries((top_k + top_k / 8 + 192 + 63) / 64 * 64) {}
  __host__ __device__ int bytes() const { return entries * int(sizeof(unsigned) + sizeof(unsigned short)); }
};

template <int QUERIES>
__global__ void __launch_bounds__(kSelecting) select(const __grid_constant__ Arguments a) {
#if NAM56R_HOPPER
  extern __shared__ __align__(16) char bytes[];
  __shared__ Bins bins[kSelecting / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * (kSelecting / 32) + warp;
  if (row >= a.pieces * QUERIES) return;
  const Piece piece(a, a.first + row / QUERIES, QUERIES);
  const int query = piece.query + row % QUERIES;
  if (query >= a.length) return;
  const uint2* list = a.lists + (long long)row * a.capacity;
  const auto [count, least] = a.counts[row];
  int* to = a.indices + ((long long)piece.batch * a.length + query) * a.top_k;
  if (count <= a.top_k) {
    for (int i = lane; i < a.top_k; i += 32) to[i] = i < count ? int(list[i].y) : -1;
    return;
  }
  const Room room(a.top_k);
  auto* score = reinterpret_cast<unsigned*>(bytes + warp * room.bytes());
  auto* from = reinterpret_cast<unsigned short*>(score + room.entries);
  const int left = keep_above(Listed<4, true>{list, count}, {unsigned(least), 0, kAll}, [&](int place, unsigned u, unsigned at) {
    if (place < room.entries) score[place] = u, from[place] = (unsigned short)at;
  });
  __syncwarp();
  if (left <= room.entries) {
    const Staged staged{score, left};
    const Cut at = cut(staged, a.top_k, a.top_k, bins[warp]);
    keep_above(staged, at, [&](int place, unsigned, unsigned entry) { to[place] = int(list[from[entry]].y); });
  } else {
    const Listed<4> listed{list, count};
    const Cut at = cut(listed, a.top_k, a.top_k, bins[warp]);
    keep_above(listed, at, [&](int place, unsigned, unsigned key) { to[place] = int(key); });
  }
#endif
}

}  // namespace nam56r::dsa
