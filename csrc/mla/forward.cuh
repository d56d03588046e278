// Attention, forward: out = softmax(scale q k^T) v, and the logarithms of the denominators.
//
// Tiling: a tile is 64 GROUPS rows; a block takes tile after tile, the longest first. Where heads share the keys a row is a
// (token, head), so that keys are loaded once for all heads; else the rows of a tile are tokens of one head. One warpgroup
// fetches by TMA, the others multiply, 64 rows each: in turns, so that the scores and values of one run while the others' weights
// are made; and the scores of the next keys are asked for together with the values of the last.
// Shared memory: q's tiles, which out leaves through, and stages of keys. A shared value is the first part of the key's tile.
// Registers: a group's scores [64, KEYS] and out [64, VALUE] in fp32, the weights [64, KEYS] in 16 bits as an operand.
// Bound: docs/notes/mla.md.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

template <class Sh, class By>
struct ForwardShared {
  Tile<64 * By::GROUPS, Sh::KEY> q[By::QUEUE];
  KeyStages<Sh, By::GROUPS, By::KEYS, By::STAGES> keys;
  Arrival q_here[By::QUEUE], q_free[By::QUEUE];
  int piece[By::QUEUE];
};

template <typename T, class Sh, class By = ForwardBy<Sh>>
__global__ void __launch_bounds__(128 * (By::GROUPS + 1), 1) forward(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  constexpr int GROUPS = By::GROUPS, KEYS = By::KEYS, QUEUE = By::QUEUE, ROWS = 64 * GROUPS;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<ForwardShared<Sh, By>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < QUEUE; ++i) s.q_here[i].make(1), s.q_free[i].make(GROUPS);
    s.keys.make();
    publish();
  }
  __syncthreads();
  const RowTiles<ROWS> work(a);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (group == GROUPS) {
    give_registers<kFetching<GROUPS>>();
    if (threadIdx.x != GROUPS * 128) return;
    for (int at = 0, fetched = 0, piece = work.pieces.next();; ++at, piece = work.pieces.next()) {
      const int slot = at % QUEUE;
      if (at >= QUEUE) s.q_free[slot].wait(at / QUEUE % 2 ^ 1);
      s.piece[slot] = piece;
      if (piece < 0) return s.q_here[slot].arrive();
      const auto place = work.place(piece);
      s.q_here[slot].expect(sizeof(s.q[0]));
      fetch<Sh::KEY>(s.q_here[slot], s.q[slot], maps.q, place.row, place.head, place.batch);
      s.keys.fetch_all(fetched, maps, work.range(place.row), place.head, place.batch);
    }
  }

  take_registers<kMultiplying<GROUPS>>();
  const int lane = threadIdx.x % 32, row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const bool first_of_group = threadIdx.x % 128 == 0;
  const float scale = a.scale * LOG2_E;
  const int turn = kTurn + group, next_turn = kTurn + (group + 1) % GROUPS;

  if (group == GROUPS - 1) arrive_at(next_turn, 256);
  for (int at = 0, taken = 0;; ++at) {
    auto& q = s.q[at % QUEUE];
    s.q_here[at % QUEUE].wait(at / QUEUE % 2);
    if (s.piece[at % QUEUE] < 0) return;
    const auto place = work.place(s.piece[at % QUEUE]);
    const Seen keys = work.range(place.row), all = work.by_all(place.row + group * 64);
    const Seen mine[2] = {seen_by(a, work.token(place.row + row)), seen_by(a, work.token(place.row + row + 8))};
    // Of the tile's blocks of keys, those that a row of the group sees.
    const int blocks = s.keys.blocks(keys), seen = Sh::SHARED ? blocks : work.blocks(keys, place.row + group * 64, KEYS);

    // of the thread's rows, two: the top score, the weights' sum, how out fades as the top rises
    float m[2] = {-infinity(), -infinity()}, l[2] = {}, fade[2];
    float out[Sh::VALUE / 8][4] = {}, p[KEYS / 8][4];
    unsigned held[KEYS / 16][4];
    const auto hide = [&](int j) {  // keys that a row doesn't see
      const int key = keys.first + j * KEYS;
      if (key >= all.first && key + KEYS <= all.end) return;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = key + i * 8 + column + e % 2;
          if (k < mine[e / 2].first || k >= mine[e / 2].end) p[i][e] = -infinity();
        }
    };
    const auto raise = [&] {
      // Where the highest is positive its bits are the highest as integers too, of which three are compared at once.
      int top[2][2] = {{__float_as_int(m[0]), int(0x80000000)}, {__float_as_int(m[1]), int(0x80000000)}};
      float highest[2];
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          top[e][i % 2] = max(max(top[e][i % 2], __float_as_int(p[i][2 * e])), __float_as_int(p[i][2 * e + 1]));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int t = max(top[e][0], top[e][1]);
        t = max(t, __shfl_xor_sync(~0u, t, 1));
        t = max(t, __shfl_xor_sync(~0u, t, 2));
        highest[e] = __int_as_float(t);
      }
      if (__any_sync(~0u, __float_as_int(highest[0]) < 0 || __float_as_int(highest[1]) < 0)) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float t = m[e];
#pragma unroll
          for (int i = 0; i < KEYS / 8; ++i) t = fmaxf(t, fmaxf(p[i][2 * e], p[i][2 * e + 1]));
          t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
          t = fmaxf(t, __shfl_xor_sync(~0u, t, 2));
          // From here on integers do: the top's weight is a power of two, which 16 bits hold.
        if (t < 0.f && t * scale > -8.f) t = fmaxf(0.f, t + ceilf(-t * scale) / scale);
          highest[e] = t;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float t = highest[e];
        fade[e] = exp2_(m[e] * scale - (t == -infinity() ? 0.f : t * scale));
        m[e] = t, l[e] *= fade[e];
      }
    };
    const auto weigh = [&] {  // scores become weights
      const float below[2] = {m[0] == -infinity() ? 0.f : m[0] * scale, m[1] == -infinity() ? 0.f : m[1] * scale};
      float sum[2][2] = {};
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[i][e] = exp2_(p[i][e] * scale - below[e / 2]);
          sum[e / 2][e % 2] += p[i][e];
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) l[e] += sum[e][0] + sum[e][1];
    };
    const auto add_values = [&](const auto& stage, bool hand_over) {
#pragma unroll
      for (int c = 0; c < KEYS / 16; ++c) Product<T, Sh::VALUE>::template held<kAlong>(out, held[c], stage.value().descriptor(c * 16, 0));
      close();
      if (hand_over) arrive_at(next_turn, 256);
    };
    const auto leave = [&](int stage) {
      settle();
      keep(held), keep(out);
      if (first_of_group) s.keys.free[stage].arrive();
    };

    for (int j = blocks; j > seen; --j) {
      wait_at(turn, 256), arrive_at(next_turn, 256);
      const int passed = s.keys.next(taken);
      if (first_of_group) s.keys.free[passed].arrive();
    }
    if (seen) {
      int now = s.keys.next(taken);
      wait_at(turn, 256);
      start();
      scores_of<T, Sh>(p, q, group * 64, s.keys.stage[now]);
      close();
      arrive_at(next_turn, 256);
      settle();
      keep(p);
      hide(seen - 1);
      raise();
      weigh();
      pack<T>(held, p);
      for (int j = seen - 2; j >= 0; --j) {
        const int then = s.keys.next(taken), from = anew(group * 64);
        wait_at(turn, 256);
        start();
        scores_of<T, Sh>(p, q, from, s.keys.stage[then]);
        close();
        add_values(s.keys.stage[now], true);
        settle<1>();
        keep(p);
        hide(j);
        raise();
        weigh();
        leave(now);
        now = then;
#pragma unroll
        for (int i = 0; i < Sh::VALUE / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[i][e] *= fade[e / 2];
        pack<T>(held, p);
      }
      start();
      add_values(s.keys.stage[now], false);
      leave(now);
    }

#pragma unroll
    for (int e = 0; e < 2; ++e) {
      l[e] += __shfl_xor_sync(~0u, l[e], 1);
      l[e] += __shfl_xor_sync(~0u, l[e], 2);
      const int of = place.row + row + 8 * e;
      const bool none = l[e] == 0.f;
      if (lane % 4 == 0 && of < work.rows) a.lse[work.index(place, of)] = none ? -infinity() : m[e] * a.scale + logf(l[e]);
      l[e] = none ? 0.f : 1.f / l[e];
    }
#pragma unroll
    for (int i = 0; i < Sh::VALUE / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] *= l[e / 2];
    store_group<T, Sh::VALUE>(q, out, maps.out, group, place.row, place.head, place.batch);
    if (first_of_group) s.q_free[at % QUEUE].arrive();
  }
#endif
}

}  // namespace nam56r::mla
