// Attention, forward: out = softmax(scale q k^T) v, and the logarithms of the denominators.
//
// Tiling: a tile is 64 GROUPS rows; a block takes tile after tile, the longest first. Where heads share the keys a row is a
// (token, head), so that keys are loaded once for all heads; else the rows of a tile are tokens of one head. One warpgroup
// fetches by TMA, the others multiply, 64 rows each: in turns, so that the values and the next scores of one run while the
// others' weights are made.
// Weights are relative to a score of the row that is looked for only in blocks which hide keys from some row, those beside the
// diagonal; everywhere else a weight is one product and one exponential. They may be far above 1, as fp32 and bf16 can hold.
// A tile where they were too high (Weights) is fetched again at its end, and every block of it is looked at.
// The denominator is the sum of the weights as the tensor cores get them, rounded: they add it up themselves, the values having a
// column of ones. So where one key has nearly all the weight, the weight's rounding is in out's denominator too.
// Shared memory: q's tiles, which out leaves through, stages of keys, ones. A shared value is the first part of the key's tile.
// Registers: a group's scores [64, KEYS] and out [64, VALUE + 8] in fp32, the weights [64, KEYS] in 16 bits as an operand.
// Bound: docs/notes/mla.md.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

template <class Sh, class By>
struct ForwardShared {
  Tile<64 * By::GROUPS, Sh::KEY> q[By::QUEUE];
  Stage<Sh, By::KEYS> stage[By::STAGES];
  Tile<16, 64> ones;
  KeyStages<Sh, By::GROUPS, By::KEYS, By::STAGES> keys;
  Arrival q_here[By::QUEUE], q_free[By::QUEUE];
  int piece[By::QUEUE];
  unsigned again[By::QUEUE];  // the groups, as bits, for which the piece is done again; 0 where it is new
  bool high[By::QUEUE][By::GROUPS];  // the group's weights of a new piece were too high
};

// One in 16 bits; the sum of weights up to which none of them overflows, nor out's sums.
template <typename T> struct Weights;
template <> struct Weights<BFloat16> {
  static constexpr unsigned short ONE = 0x3f80;
  static constexpr float MOST = 0x1p96f;
};
template <> struct Weights<Float16> {
  static constexpr unsigned short ONE = 0x3c00;
  static constexpr float MOST = 0x1p15f;
};

template <typename T, class Sh, class By = ForwardBy<Sh>>
__global__ void __launch_bounds__(128 * (By::GROUPS + 1), 1) forward(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  constexpr int GROUPS = By::GROUPS, KEYS = By::KEYS, QUEUE = By::QUEUE, ROWS = 64 * GROUPS, SUM = Sh::VALUE / 8;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<ForwardShared<Sh, By>*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < QUEUE; ++i) s.q_here[i].make(1), s.q_free[i].make(GROUPS);
    s.keys.make();
  }
  for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) s.ones.x[0][i / 64][i % 64] = Weights<T>::ONE;
  publish();
  __syncthreads();
  wait_for_previous();
  const RowTiles<ROWS> work(a);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (group == GROUPS) {
    give_registers<kFetching<GROUPS>>();
    if (threadIdx.x != GROUPS * 128) return;
    for (int at = 0, fetched = 0, coming = work.pieces.next();; ++at) {
      int piece = coming;
      unsigned again = 0;
      // The tile that was in the slot, and where nothing comes any more all others, may have to be done again.
      for (int i = at; i < at + (coming < 0 ? QUEUE : 1) && !again; ++i) {
        if (i < QUEUE) continue;
        const int slot = i % QUEUE;
        s.q_free[slot].wait(i / QUEUE % 2 ^ 1);
        if (s.again[slot]) continue;
        for (int g = 0; g < GROUPS; ++g) again |= s.high[slot][g] << g;
        if (again) piece = s.piece[slot], s.again[slot] = again;
      }
      const int slot = at % QUEUE;
      s.piece[slot] = piece, s.again[slot] = again;
      if (piece < 0) return s.q_here[slot].arrive();
      const auto place = work.place(piece);
      s.q_here[slot].expect(sizeof(s.q[0]));
      fetch<Sh::KEY>(s.q_here[slot], s.q[slot], maps.q, place.row, place.head, place.batch);
      s.keys.fetch_all(s.stage, fetched, maps, work.range(place.row), place.head, place.batch);
      if (!again) coming = work.pieces.next();
    }
  }

  take_registers<kMultiplying<GROUPS>>();
  const int lane = threadIdx.x % 32, row = group * 64 + warp_row() + lane / 4, column = lane % 4 * 2;
  const bool first_of_group = threadIdx.x % 128 == 0;
  const float scale = a.scale * LOG2_E;
  const Turns<GROUPS> turns(group);
  for (int at = 0, taken = 0;; ++at) {
    const int slot = at % QUEUE;
    auto& q = s.q[slot];
    s.q_here[slot].wait(at / QUEUE % 2);
    if (s.piece[slot] < 0) return;
    const auto place = work.place(s.piece[slot]);
    const unsigned again = s.again[slot];
    const Seen keys = work.range(place.row), all = work.by_all(place.row + group * 64);
    const Seen mine[2] = {seen_by(a, work.token(place.row + row)), seen_by(a, work.token(place.row + row + 8))};
    // Blocks between these keys aren't looked at: every row has seen a key behind them.
    const Seen inner = again ? Seen{1 << 30, 0} : all;
    // Of the tile's blocks of keys, those that a row of the group sees.
    const int blocks = s.keys.blocks(keys), seen = Sh::SHARED ? blocks : work.blocks(keys, place.row + group * 64, KEYS);

    float m[2] = {-infinity(), -infinity()};  // of the thread's rows, two: the score that weights are relative to
    float out[SUM + 1][4] = {}, p[KEYS / 8][4];  // in the last eight columns of out, all alike, the sum of the weights
    unsigned held[KEYS / 16][4];
    const auto look = [&](int j) {  // hides what a row doesn't see, and raises m to the top score
      const int key = keys.first + j * KEYS;
      if (__all_sync(~0u, key >= inner.first && key + KEYS < inner.end)) return;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = key + i * 8 + column + e % 2;
          if (k < mine[e / 2].first || k >= mine[e / 2].end) p[i][e] = -infinity();
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = m[e];
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) top = fmaxf(top, fmaxf(p[i][2 * e], p[i][2 * e + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float fade = exp2_(m[e] * scale - (top == -infinity() ? 0.f : top * scale));
        m[e] = top;
#pragma unroll
        for (int i = 0; i < SUM + 1; ++i) out[i][2 * e] *= fade, out[i][2 * e + 1] *= fade;
      }
    };
    const auto weigh = [&] {  // scores become weights
      const float below[2] = {m[0] == -infinity() ? 0.f : m[0] * scale, m[1] == -infinity() ? 0.f : m[1] * scale};
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[i][e] = exp2_(p[i][e] * scale - below[e / 2]);
      pack<T>(held, p);
    };
    const auto add_values = [&](const auto& stage) {
      const auto& value = stage.value();
      constexpr int LAST = Sh::VALUE - 64;
#pragma unroll
      for (int c = 0; c < KEYS / 16; ++c) {
#pragma unroll
        for (int part = 0; part < LAST; part += 64)
          Product<T, 64>::template held<kAlong>(reinterpret_cast<float(&)[8][4]>(out[part / 8]), held[c], value.descriptor(c * 16, part));
        Product<T, 72>::template held<kAlong>(reinterpret_cast<float(&)[9][4]>(out[LAST / 8]), held[c], value.descriptor(c * 16, LAST, s.ones));
      }
      close();
    };
    const auto leave = [&](int stage) {
      keep(held), keep(out);
      if (first_of_group) s.keys.free[stage].arrive();
    };

    for (int j = blocks; j > seen; --j) {
      turns.take(), turns.hand_over();
      const int passed = s.keys.next(taken);
      if (first_of_group) s.keys.free[passed].arrive();
    }
    if (seen) {
      int now = s.keys.next(taken);
      turns.take();
      start();
      scores_of<T, Sh>(p, q, group * 64, s.stage[now]);
      close();
      turns.hand_over();
      settle();
      keep(p);
      look(seen - 1);
      weigh();
      for (int j = seen - 2; j >= 0; --j) {
        const int then = s.keys.next(taken), from = anew(group * 64);
        turns.take();
        start();
        add_values(s.stage[now]);
        scores_of<T, Sh>(p, q, from, s.stage[then]);
        close();
        settle<1>();
        turns.hand_over();
        leave(now);
        settle();
        keep(p);
        look(j);
        weigh();
        now = then;
      }
      start();
      add_values(s.stage[now]);
      settle();
      leave(now);
    }

    bool high = false;
#pragma unroll
    for (int e = 0; e < 2; ++e) high = high || !(out[SUM][2 * e] < Weights<T>::MOST) || (m[e] == -infinity() && out[SUM][2 * e] > 0.f);
#pragma unroll
    for (int i = 0; i < SUM; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) high = high || !(fabsf(out[i][e]) < infinity());
    high = any_at(kGroup + group, 128, high);
    if (first_of_group) s.high[slot][group] = high;
    // Done again, a piece is some group's only result, and others have theirs.
    const bool wanted = again ? again >> group & 1 : !high;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int of = place.row + row + 8 * e;
      const float sum = out[SUM][2 * e], part = sum == 0.f ? 0.f : 1.f / sum;
      if (wanted && lane % 4 == 0 && of < work.rows)
        a.lse[work.index(place, of)] = sum == 0.f ? -infinity() : m[e] * a.scale + logf(sum);
#pragma unroll
      for (int i = 0; i < SUM; ++i) out[i][2 * e] *= part, out[i][2 * e + 1] *= part;
    }
    store_group<T, Sh::VALUE>(q, out, maps.out, group, place.row, place.head, place.batch, wanted);
    if (a.rest) {
#pragma unroll
      for (int i = 0; i < SUM; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const float2 rounded = Pair<T>::unpack(Pair<T>::pack(out[i][e], out[i][e + 1]));
          out[i][e] -= rounded.x, out[i][e + 1] -= rounded.y;
        }
      wait_at(kGroup + group, 128);  // out has left the tile
      store_group<T, Sh::VALUE>(q, out, maps.rest, group, place.row, place.head, place.batch, wanted);
    }
    if (first_of_group) s.q_free[slot].arrive();
  }
#endif
}

}  // namespace nam56r::mla
