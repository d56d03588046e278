// The indexer: for every query t the top_k keys s <= t by I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]), in one pass over tiles.
//
// Tiling: a block takes QUERIES queries of all heads after QUERIES, those that see most first, and all keys that any of them sees,
// 192 at a time. Three warpgroups multiply, 64 keys each: a product is keys x (head, query), [64, D] x [D, 128], so that a thread
// has all heads of its (key, query) pairs one after the other and adds them up by itself: while relu and weights
// of one run, the tensor cores are the others'. More warps pass over what can't be among the top_k and append the rest to the
// queries' lists (filter.cuh); another kernel selects from these (select.cuh).
// Shared memory: the queries of all heads, 128 KiB, and their weights; a tile of keys a group; two tiles of scores.
// Registers: the product [64, 128], the sums [64, QUERIES] in fp32, the keys [64, D] as an operand. 8 bits: PACK heads lie in a row of D
// columns, and a product takes its part of it.
// Memory: a list of `capacity` candidates for each query of a launch, which takes some of the pieces: docs/notes/dsa.md.
// Bound: relu and weights, whose loads share the way to shared memory with the products' own, and the warps that filter, by latency;
// in long runs the device's power: docs/notes/dsa.md.
#pragma once

#include "dsa/filter.cuh"
#include "hopper/groups.cuh"
#include "hopper/wgmma.cuh"

namespace nam56r::dsa {

constexpr int kGroups = 3, kGroupKeys = 64, kKeys = kGroups * kGroupKeys, kColumns = 128;
constexpr int kSpread = 4;  // a row of scores begins on another bank than the one before it

// What a block holds: queries as rows of D columns of 16 bits, 64 or 128 (fewer are filled up), PACK heads in each, in tiles of 128
// (head, query), as many as there is room for. 8-bit features lie two in a column, so that a head's are a row, a half or a quarter.
template <typename T_, int D_, int QUERIES_, int PACK_ = 1>
struct Shape {
  using T = T_;
  static constexpr bool kScaled = sizeof(T) == 1;
  static constexpr int D = D_, QUERIES = QUERIES_, PACK = PACK_, HEADS = kColumns / QUERIES;  // HEADS: of a product
  static constexpr int TILES = 512 / D / (PACK == 4 ? 2 : 1), MOST = TILES * HEADS * PACK;
  static constexpr int FILTERS = D == 64 ? 8 : 4, ROWS = QUERIES / FILTERS;  // warps that filter, and the queries of one
  static constexpr int THREADS = 128 * kGroups + 32 * FILTERS;
  static constexpr int MULTIPLYING = FILTERS == 8 ? 120 : 136, FILTERING = FILTERS == 8 ? 56 : 104;  // registers of a thread
};

template <class Sh>
struct Shared {
  Tile<kColumns, Sh::D> q[Sh::TILES];
  Tile<kGroupKeys, Sh::D> k[kGroups];
  float score[2][Sh::QUERIES][kKeys + kSpread];
  float weight[Sh::MOST][Sh::QUERIES];
  Steps steps[Sh::QUERIES];
  Bins bins[Sh::FILTERS];
  int odd;  // there was a score that is NaN
  Arrival q_here[Sh::TILES], k_here[kGroups], full[2], free[2];
};

// relu that lets NaN through
__device__ inline float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

template <class Sh>
__global__ void __launch_bounds__(Sh::THREADS, 1) index(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  constexpr int QUERIES = Sh::QUERIES, PACK = Sh::PACK, EACH = QUERIES < 8 ? 1 : QUERIES / 8;  // EACH: products' eights of columns of a head
  constexpr int SUMS = Sh::D / 16 / PACK;  // products of a step, each over 16 columns
  using T = typename Sh::T;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<Shared<Sh>*>(bytes);
  if (threadIdx.x == 0) {
    for (auto& one : s.q_here) one.make();
    for (auto& one : s.k_here) one.make();
    for (int i = 0; i < 2; ++i) s.full[i].make(kGroups * 4), s.free[i].make(Sh::FILTERS);
    s.odd = 0;
    publish();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int tiles_of_q = (a.heads + Sh::HEADS * PACK - 1) / (Sh::HEADS * PACK);
  // Long pieces before short ones, and the other way round every other time.
  const auto piece_of = [&](int round) { return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); };
  int tile = 0;  // of scores, since the beginning
  if (group >= kGroups) {
    give_registers<Sh::FILTERING>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 - kGroups * 4, 0);
    for (int round = 0, number; (number = piece_of(round)) < a.pieces; ++round) {
      const Piece piece(a, a.first + number, QUERIES);
      const int first = seen_by(a, piece.query).first, end = min(piece.query + QUERIES, a.length);
      constexpr int ROWS = Sh::ROWS;
      const int row = warp * ROWS;
      Rows<ROWS> rows(a, s.steps + row, a.lists + ((long long)number * QUERIES + row) * a.capacity, piece.query + row, end);
      for (int key = first; key < end; key += kKeys, ++tile) {
        s.full[tile % 2].wait(tile / 2 % 2);
        const bool odd = *reinterpret_cast<volatile int*>(&s.odd);
        rows.template take<kKeys>(s.score[tile % 2] + row, key, a, odd, s.bins[warp]);
        __syncwarp();
        if (lane == 0) s.free[tile % 2].arrive();
      }
      rows.finish(a.counts + number * QUERIES + row, a.top_k);
    }
    return;
  }

  take_registers<Sh::MULTIPLYING>();
  const bool first_of_group = threadIdx.x % 128 == 0;
  for (int round = 0, number; (number = piece_of(round)) < a.pieces; ++round) {
    const Piece piece(a, a.first + number, QUERIES);
    const int query = piece.query, batch = piece.batch;
    const int first = seen_by(a, query).first, end = min(query + QUERIES, a.length), tiles = (end - first + kKeys - 1) / kKeys;
    const auto fetch = [&](int j) {
      s.k_here[group].expect(sizeof(s.k[group]));
#pragma unroll
      for (int part = 0; part < Sh::D / 64; ++part)
        s.k_here[group].copy_rows(&s.k[group].x[part][0][0], &maps.k, part * 64, first + j * kKeys + group * kGroupKeys, batch, 0);
    };
    wait_at(kGroup + kGroups, 128 * kGroups);  // the queries before these aren't used any more
    if (threadIdx.x == 0)
      for (int i = 0; i < tiles_of_q; ++i) {
        s.q_here[i].expect(sizeof(s.q[i]));
#pragma unroll
        for (int part = 0; part < Sh::D / 64; ++part) s.q_here[i].copy_rows(&s.q[i].x[part][0][0], &maps.q, part * 64, query, i * Sh::HEADS, batch);
      }
    if (first_of_group) fetch(0);
    for (int i = threadIdx.x; i < a.heads * QUERIES; i += 128 * kGroups) {
      const int t = i / a.heads, h = i % a.heads;
      // a thread's queries 2 t, 2 t + 1 of all eights lie together
      const int place = QUERIES < 8 ? t : t % 8 / 2 * (2 * EACH) + t / 8 * 2 + t % 2;
      s.weight[h][place] = a.weights[((long long)batch * a.length + min(query + t, a.length - 1)) * a.heads + h];
    }
    wait_at(kGroup + kGroups, 128 * kGroups);

    for (int j = 0; j < tiles; ++j, ++tile) {
      unsigned k[SUMS][4];
      s.k_here[group].wait(tile % 2);
#pragma unroll
      for (int c = 0; c < SUMS; ++c) s.k[group].operand(k[c], warp_row(), c * 16);
      const int key = group * kGroupKeys + warp_row() + lane_anew() / 4;  // and the one eight on, of the tile
      float scale[2];
      if constexpr (Sh::kScaled) {
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[i] = a.scales[(long long)batch * a.length + min(first + j * kKeys + key + 8 * i, a.length - 1)];
      }

      float sum[EACH][4] = {};
      for (int step = 0; step < tiles_of_q * PACK; ++step) {
        if (j == 0) s.q_here[step / PACK].wait(round % 2);
        float p[kColumns / 8][4];
        const auto& q = s.q[anew(step / PACK)];
        const int from = step % PACK * SUMS * 16;
        start();
        Product<T, kColumns>::template held_first<kAcross>(p, k[0], q.descriptor(0, from));
#pragma unroll
        for (int c = 1; c < SUMS; ++c) Product<T, kColumns>::template held<kAcross>(p, k[c], q.descriptor(0, from + c * 16));
        finish();
        keep(p), keep(k);
        if (step == 0) {
          wait_at(kGroup + group, 128);  // all have the keys, for their products have run
          if (first_of_group && j + 1 < tiles) fetch(j + 1);
        }
        const auto add = [&](auto whole) {
#pragma unroll
          for (int i = 0; i < kColumns / 8; i += EACH) {
            const int column = QUERIES < 8 ? i * 2 + lane % 4 / 2 : i / EACH, head = (step / PACK * Sh::HEADS + column) * PACK + step % PACK;
            if (!whole && head >= a.heads) continue;
            const float* w = &s.weight[head][QUERIES < 8 ? lane % 2 * 2 : lane % 4 * 2 * EACH];
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
              const float2 of = *reinterpret_cast<const float2*>(w + 2 * e);
              sum[e][0] += of.x * relu(p[i + e][0]), sum[e][1] += of.y * relu(p[i + e][1]);
              sum[e][2] += of.x * relu(p[i + e][2]), sum[e][3] += of.y * relu(p[i + e][3]);
            }
          }
        };
        if ((step / PACK + 1) * Sh::HEADS * PACK <= a.heads) add(Bool<true>{});
        else add(Bool<false>{});
      }

      bool odd = false;
      s.free[tile % 2].wait(tile / 2 % 2 ^ 1);
#pragma unroll
      for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = sum[e][i];
          if (QUERIES < 8) x += __shfl_xor_sync(~0u, x, 2);  // the thread's own are half of the heads
          if constexpr (Sh::kScaled) x *= scale[i / 2];
          const int row = QUERIES < 8 ? lane % 2 * 2 + i % 2 : e * 8 + lane % 4 * 2 + i % 2;
          if (QUERIES >= 8 || lane % 4 < 2) s.score[tile % 2][row][key + i / 2 * 8] = x;
          odd = odd || x != x;
        }
      if (odd) s.odd = 1;
      __syncwarp();
      if (lane == 0) s.full[tile % 2].arrive();
    }
  }
#endif
}

}  // namespace nam56r::dsa
