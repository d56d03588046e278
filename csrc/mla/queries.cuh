// Attention, backward: dq = dS k, dS = scale P (dP - sum P dP), P = e^(scale q k^T - lse), dP = dout v^T.
//
// Tiling and work as in forward. The scores of the next keys are asked for together with dq's product of the last, and dP too where
// there is room: the registers of three groups don't hold both dP and an operand in use, so that it comes after.
// Shared memory: tiles of q, which dq leaves through, and dout; stages of keys.
// Registers: dq [64, KEY], scores and dP [64, KEYS] in fp32, dS [64, KEYS] in 16 bits as an operand; where there is room, dout as one.
// Bound: tensor cores, at the clock that power allows: docs/notes/mla.md.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

template <class Sh, class By>
struct QueriesShared {
  Tile<64 * By::GROUPS, Sh::KEY> q;  // dq leaves through it
  Tile<64 * By::GROUPS, Sh::VALUE> dout;
  Stage<Sh, By::KEYS> stage[By::STAGES];
  KeyStages<Sh, By::GROUPS, By::KEYS, By::STAGES> keys;
  Arrival q_here, q_free;
  int piece;
};

template <typename T, class Sh, class By = QueriesBy<Sh>>
__global__ void __launch_bounds__(128 * (By::GROUPS + 1), 1) queries(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  constexpr int GROUPS = By::GROUPS, KEYS = By::KEYS, ROWS = 64 * GROUPS;
  constexpr bool ROOM = By::ROOM;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<QueriesShared<Sh, By>*>(bytes);
  if (threadIdx.x == 0) {
    s.q_here.make(1), s.q_free.make(GROUPS);
    s.keys.make();
    publish();
  }
  __syncthreads();
  wait_for_previous();
  release_next();  // keys begins where a block has ended: it needs what this kernel needs
  const RowTiles<ROWS> work(a);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == GROUPS) {
    give_registers<kFetching<GROUPS>>();
    if (threadIdx.x != GROUPS * 128) return;
    for (int at = 0, fetched = 0, piece = work.pieces.next();; ++at, piece = work.pieces.next()) {
      if (at) s.q_free.wait(at % 2 ^ 1);
      s.piece = piece;
      if (piece < 0) return s.q_here.arrive();
      const auto w = work.place(piece);
      s.q_here.expect(sizeof(s.q) + sizeof(s.dout));
      fetch<Sh::KEY>(s.q_here, s.q, maps.q, w.row, w.head, w.batch);
      fetch<Sh::VALUE>(s.q_here, s.dout, maps.dout, w.row, w.head, w.batch);
      s.keys.fetch_all(s.stage, fetched, maps, work.range(w.row), w.head, w.batch);
    }
  }
  take_registers<kMultiplying<GROUPS>>();
  const int lane = threadIdx.x % 32, row = group * 64 + warp_row() + lane / 4, column = lane % 4 * 2;
  const bool first_of_group = threadIdx.x % 128 == 0;
  const float scale = a.scale * LOG2_E;
  const Turns<GROUPS> turns(group);
  int taken = 0, at = 0;
  while (true) {
    s.q_here.wait(at % 2);
    ++at;
    if (s.piece < 0) return;
    const auto w = work.place(s.piece);
    const Seen keys = work.range(w.row), all = work.by_all(w.row + group * 64);
    const Seen mine[2] = {seen_by(a, work.token(w.row + row)), seen_by(a, work.token(w.row + row + 8))};
    const int blocks = s.keys.blocks(keys), seen = Sh::SHARED ? blocks : work.blocks(keys, w.row + group * 64, KEYS);
    float2 fact[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // of a row past the last, too: padded
      const float* from = a.facts + ((long long)w.batch * a.apart + w.head) * a.padded + w.row + row + 8 * e;
      fact[e] = {from[0], from[(long long)a.batch * a.apart * a.padded]};
    }
    float dq[Sh::KEY / 8][4] = {}, p[KEYS / 8][4];
    unsigned held[KEYS / 16][4];
    const auto weigh = [&](int j) {
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[i][e] = exp2_(p[i][e] * scale - fact[e / 2].x);
      const int key = keys.first + j * KEYS;
      if (key < all.first || key + KEYS > all.end) {
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int k = key + i * 8 + column + e % 2;
            if (k < mine[e / 2].first || k >= mine[e / 2].end) p[i][e] = 0.f;
          }
      }
    };
    float d[KEYS / 8][4];
    unsigned dout[ROOM ? Sh::VALUE / 16 : 1][4];
    if constexpr (ROOM) {
#pragma unroll
      for (int c = 0; c < Sh::VALUE / 16; ++c) s.dout.operand(dout[c], group * 64 + warp_row(), c * 16);
    }
    const auto dP = [&](int from, const auto& stage) {
      const auto value = [&](int c) { return stage.value().descriptor(0, c); };
      if constexpr (ROOM) multiply<T, Sh::VALUE>(d, dout, value);
      else multiply<T, Sh::VALUE>(d, [&](int c) { return s.dout.descriptor(from, c); }, value);
      close();
    };
    const auto differ = [&] {  // dS, as an operand
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[i][e] *= d[i][e] * a.scale - fact[e / 2].y;
      pack<T>(held, p);
    };
    const auto add_keys = [&](const auto& stage) {
      add_rows<T, Sh::NOPE, KEYS>(dq, held, stage.nope);
      add_rows<T, Sh::ROPE, KEYS>(dq, held, stage.rope, Sh::NOPE);
      close();
    };
    const auto leave = [&](int stage) {
      settle();
      keep(held), keep(dq);
      if (first_of_group) s.keys.free[stage].arrive();
    };
    for (int j = blocks; j > seen; --j) {
      if (j > 1) turns.take(), turns.hand_over();  // all groups take one turn less than there are blocks
      const int passed = s.keys.next(taken);
      if (first_of_group) s.keys.free[passed].arrive();
    }
    if (seen) {
      int now = s.keys.next(taken);
      start();
      scores_of<T, Sh>(p, s.q, group * 64, s.stage[now]);
      close();
      dP(group * 64, s.stage[now]);
      settle<1>();
      keep(p);
      weigh(seen - 1);
      settle();
      keep(d);
      differ();
      for (int j = seen - 2; j >= 0; --j) {
        const int then = s.keys.next(taken), from = anew(group * 64);
        turns.take();
        start();
        scores_of<T, Sh>(p, s.q, from, s.stage[then]);
        close();
        add_keys(s.stage[now]);
        if constexpr (ROOM) dP(from, s.stage[then]);
        turns.hand_over();
        settle<ROOM ? 2 : 1>();
        keep(p);
        weigh(j);
        leave(now);
        if constexpr (!ROOM) {
          start();
          dP(from, s.stage[then]);
          settle();
        }
        keep(d);
        differ();
        now = then;
      }
      start();
      add_keys(s.stage[now]);
      leave(now);
    }
    store_group<T, Sh::KEY>(s.q, dq, maps.dq, group, w.row, w.head, w.batch);
    if (first_of_group) s.q_free.arrive();
  }
#endif
}

}  // namespace nam56r::mla
