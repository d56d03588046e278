// Attention, backward: dk = dS^T q and dv = P^T dout (see queries.cuh), summed over all rows that see the keys.
//
// Tiling: a piece of work is 64 GROUPS keys of a head, or of all heads that share them, and a split of the rows that see them.
// Scores are made transposed, [keys, rows], so that P^T and dS^T are operands as they lie in registers. The next rows' scores are
// asked for together with the last rows' sums, or with SUMS_FIRST when these have settled: fewer registers then hold more rows, and
// what is read of the keys from shared memory, for every product, serves more of them. Groups take turns as in forward.
// Where the value is the key's first part, dv is added to the same accumulators. Their sums over splits, and over the heads of a
// shared rope key, are partial results in fp32, summed in a fixed order afterwards.
// Shared memory: the keys, stages of q, dout and facts. Registers: dk, dv, scores, dP in fp32, P and dS as operands; with HELD
// the keys as operands too, for shared memory would be busy all the time.
// Bound: tensor cores, at the clock that power allows; with SUMS_FIRST shared memory, and the wait for sums: docs/notes/mla.md.
#pragma once

#include "mla/tiles.cuh"

namespace nam56r::mla {

template <class Sh, class By>
struct KeysShared {
  Stage<Sh, 64 * By::GROUPS> keys;  // dk and dv leave through it, where each head has its own
  struct {
    Tile<By::ROWS, Sh::KEY> q;
    Tile<By::ROWS, Sh::VALUE> dout;
    alignas(16) float facts[2][By::ROWS];
  } stage[By::STAGES];
  int piece;
  Arrival keys_here, keys_free, here[By::STAGES], free[By::STAGES];
};

template <typename T, class Sh, class By = KeysBy<Sh>>
__global__ void __launch_bounds__(128 * (By::GROUPS + 1), 1) keys(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  constexpr int GROUPS = By::GROUPS, ROWS = By::ROWS, STAGES = By::STAGES, KEYS = 64 * GROUPS;
  constexpr bool HELD = By::HELD, SUMS_FIRST = By::SUMS_FIRST;
  static_assert(ROWS <= 64, "an element of a thread's scores has a bit in `hidden`");
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<KeysShared<Sh, By>*>(bytes);
  if (threadIdx.x == 0) {
    s.keys_here.make(1), s.keys_free.make(GROUPS);
    for (int i = 0; i < STAGES; ++i) s.here[i].make(1), s.free[i].make(GROUPS);
    publish();
  }
  __syncthreads();
  release_next();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  struct Work {
    int key, head, batch, split, first, end;  // of row tiles
  };
  const Pieces pieces(a, (a.keys + KEYS - 1) / KEYS * a.splits, a.taken + 1);
  const auto work_of = [&](int at) {  // the first keys, which most see, first
    const auto piece = pieces.piece(at);
    Work w;
    w.head = piece.head % a.apart, w.batch = piece.head / a.apart, w.split = piece.number % a.splits, w.key = piece.number / a.splits * KEYS;
    const Seen tokens = seeing(a, w.key, w.key + KEYS);
    const long long low = (long long)tokens.first * a.packed / ROWS, high = ((long long)tokens.end * a.packed + ROWS - 1) / ROWS;
    const long long count = tokens.end > tokens.first ? high - low : 0;
    w.first = int(low + count * w.split / a.splits), w.end = int(low + count * (w.split + 1) / a.splits);
    return w;
  };
  if (group == GROUPS) {
    give_registers<kFetching<GROUPS>>();
    if (threadIdx.x != GROUPS * 128) return;
    for (int at = 0, fetched = 0, piece = pieces.next();; ++at, piece = pieces.next()) {
      if (at) s.keys_free.wait(at % 2 ^ 1);
      s.piece = piece;
      if (piece < 0) {
        s.keys_here.arrive();
        return wait_for_previous();  // what comes behind this kernel comes behind queries too
      }
      const Work w = work_of(piece);
      fetch_keys<Sh, KEYS>(s.keys_here, s.keys, maps, w.key, w.head, w.batch);
      for (int tile = w.first; tile < w.end; ++tile, ++fetched) {
        auto& stage = s.stage[fetched % STAGES];
        auto& here = s.here[fetched % STAGES];
        if (fetched >= STAGES) s.free[fetched % STAGES].wait(fetched / STAGES % 2 ^ 1);
        here.expect(sizeof(stage.q) + sizeof(stage.dout) + sizeof(stage.facts));
        fetch<Sh::KEY>(here, stage.q, maps.q, tile * ROWS, w.head, w.batch);
        fetch<Sh::VALUE>(here, stage.dout, maps.dout, tile * ROWS, w.head, w.batch);
        const float* facts = a.facts + ((long long)w.batch * a.apart + w.head) * a.padded + tile * ROWS;
        here.copy(stage.facts[0], facts, sizeof(stage.facts[0]));
        here.copy(stage.facts[1], facts + (long long)a.batch * a.apart * a.padded, sizeof(stage.facts[1]));
      }
    }
  }
  take_registers<kMultiplying<GROUPS>>();
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const bool first_of_group = threadIdx.x % 128 == 0;
  const float scale = a.scale * LOG2_E;
  const Turns<GROUPS> turns(group);
  int taken = 0, at = 0;
  while (true) {
    s.keys_here.wait(at % 2);
    ++at;
    if (s.piece < 0) return;
    const Work w = work_of(s.piece);
    constexpr int V = Sh::SHARED ? 0 : Sh::VALUE;
    float dk[Sh::KEY / 8][4] = {}, p[ROWS / 8][4];
    [[maybe_unused]] float dv[V / 8 + 1][4] = {};
    const int key = w.key + group * 64 + warp_row() + lane / 4;  // the thread's: key, key + 8
    Seen whole;  // the rows that see all of the group's keys
    int first;   // of the tiles, with a row that sees any
    {
      const int low = w.key + group * 64, high = low + 64;
      const Seen x = seeing(a, low, low + 1), y = seeing(a, high - 1, high);
      whole = {max(x.first, y.first) * a.packed, high <= a.keys ? min(x.end, y.end) * a.packed : 0};
      first = max(w.first, min(w.end, min(x.first, y.first) * a.packed / ROWS));
    }
    unsigned key_held[HELD ? Sh::KEY / 16 : 1][4];
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < Sh::KEY / 16; ++k) {
        if (k * 16 < Sh::NOPE) s.keys.nope.operand(key_held[k], group * 64 + warp_row(), k * 16);
        else s.keys.rope.operand(key_held[k], group * 64 + warp_row(), k * 16 - Sh::NOPE);
      }
    }
    const auto store_partial = [&](const auto& x, float* to, int stride) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (key + 8 * e >= a.keys) continue;
#pragma unroll
        for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i)
          *reinterpret_cast<float2*>(to + (long long)(key + 8 * e) * stride + i * 8 + column) = {x[i][2 * e], x[i][2 * e + 1]};
      }
    };
    // x = the keys' COLUMNS, or the values', times those of a tile
    const auto times = [&](auto columns, auto& x, const auto& tile, const auto& of_keys) {
      const auto theirs = [&](int c) { return tile.descriptor(0, c); };
      if constexpr (HELD) {
        multiply<T, columns>(x, key_held, theirs);
      } else {
        const int from = anew(group * 64);
        multiply<T, columns>(x, [&](int c) { return of_keys(from, c); }, theirs);
      }
      close();
    };
    float d[ROWS / 8][4];
    unsigned held_p[ROWS / 16][4], held_d[ROWS / 16][4];
    const auto scores = [&](const auto& stage) {
      times(Int<Sh::KEY>{}, p, stage.q, [&](int row, int c) { return s.keys.key(row, c); });
    };
    const auto dP = [&](const auto& stage) {
      times(Int<Sh::VALUE>{}, d, stage.dout, [&](int row, int c) { return s.keys.value().descriptor(row, c); });
    };
    float2 fact[ROWS / 8];
    const auto facts = [&](const auto& stage, int which) {  // of the thread's columns
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i) fact[i] = *reinterpret_cast<const float2*>(&stage.facts[which][i * 8 + column]);
    };
    const auto weigh = [&](int tile) {
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[i][e] = exp2_(p[i][e] * scale - (e % 2 ? fact[i].y : fact[i].x));
      if (tile * ROWS < whole.first || tile * ROWS + ROWS > whole.end) {
        constexpr int AT_ONCE = SUMS_FIRST ? 3 : ROWS / 8;  // or scores are spilled in every pass, masked or not
        unsigned hidden = 0;
#pragma unroll AT_ONCE
        for (int i = 0; i < ROWS / 8; ++i) {
          const int4 two = *reinterpret_cast<const int4*>(&a.seen[tile * ROWS + i * 8 + column]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int k = key + e / 2 * 8;
            hidden |= unsigned(k < (e % 2 ? two.z : two.x) || k >= (e % 2 ? two.w : two.y)) << (i * 4 + e);
          }
        }
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (hidden >> (i * 4 + e) & 1) p[i][e] = 0.f;
      }
    };
    const auto differ = [&](const auto& stage) {  // P and dS, as operands
      facts(stage, 1);
      pack<T>(held_p, p);
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[i][e] *= d[i][e] * a.scale - (e % 2 ? fact[i].y : fact[i].x);
      pack<T>(held_d, p);
    };
    const auto add = [&](const auto& stage) {
      if constexpr (Sh::SHARED) add_rows<T, Sh::VALUE, ROWS>(dk, held_p, stage.dout);
      else add_rows<T, Sh::VALUE, ROWS>(dv, held_p, stage.dout);
      add_rows<T, Sh::KEY, ROWS>(dk, held_d, stage.q);
      close();
    };
    const auto leave = [&](int stage) {
      settle();
      keep(held_p), keep(held_d), keep(dk);
      if constexpr (!Sh::SHARED) keep(dv);
      if (first_of_group) s.free[stage].arrive();
    };
    for (int tile = w.first; tile < first; ++tile, ++taken) {
      turns.take(), turns.hand_over();
      s.here[taken % STAGES].wait(taken / STAGES % 2);
      if (first_of_group) s.free[taken % STAGES].arrive();
    }
    if (first < w.end) {
      int now = taken % STAGES;
      s.here[now].wait(taken / STAGES % 2), ++taken;
      turns.take();
      start();
      scores(s.stage[now]);
      dP(s.stage[now]);
      turns.hand_over();
      settle<1>();
      keep(p);
      facts(s.stage[now], 0);
      weigh(first);
      settle();
      keep(d);
      if constexpr (HELD) {  // only now: a load that was asked for before a barrier may still be under way behind it
        wait_at(kGroup + group, 128);
        if (first_of_group) s.keys_free.arrive();
      }
      differ(s.stage[now]);
      for (int tile = first + 1; tile < w.end; ++tile) {
        const int then = taken % STAGES;
        s.here[then].wait(taken / STAGES % 2), ++taken;
        turns.take();
        start();
        if constexpr (SUMS_FIRST) {
          add(s.stage[now]);
          facts(s.stage[then], 0);  // later, scores and dP would leave hardly any of shared memory's time for it
          leave(now);
          start();
        }
        scores(s.stage[then]);
        if constexpr (!SUMS_FIRST) add(s.stage[now]);
        dP(s.stage[then]);
        turns.hand_over();
        settle<SUMS_FIRST ? 1 : 2>();
        keep(p);
        if constexpr (!SUMS_FIRST) facts(s.stage[then], 0);
        weigh(tile);
        if constexpr (SUMS_FIRST) settle();
        else leave(now);
        keep(d);
        differ(s.stage[then]);
        now = then;
      }
      wait_at(kGroup + group, 128);  // all of the group have read the stage's facts
      start();
      add(s.stage[now]);
      leave(now);
    } else if (HELD && first_of_group) {
      s.keys_free.arrive();
    }
    if constexpr (Sh::SHARED) {
      if (!HELD && first_of_group) s.keys_free.arrive();
      store_partial(dk, a.partial + ((long long)w.split * a.batch + w.batch) * a.keys * Sh::KEY, Sh::KEY);
    } else {  // the group's own keys, which it has multiplied, make place
      store_group<T, Sh::NOPE>(s.keys.nope, dk, maps.dnope, group, w.key, w.head, w.batch);
      store_group<T, Sh::VALUE>(s.keys.v, dv, maps.dv, group, w.key, w.head, w.batch);
      if (first_of_group) s.keys_free.arrive();
      store_partial(reinterpret_cast<float(&)[Sh::ROPE / 8][4]>(dk[Sh::NOPE / 8]),
          a.partial + ((long long)w.batch * a.keys * a.apart + w.head) * Sh::ROPE, a.apart * Sh::ROPE);
    }
  }
#endif
}

}  // namespace nam56r::mla
