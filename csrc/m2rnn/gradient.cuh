// What: the gradient of the state walked back through the sequence. With G_t the gradient of H_t and
//   s_t = (1 - f_t)(1 - Z_t²), P_t = G_t ⊙ s_t:   G_{t-1} = f_t G_t + P_t Wᵀ + q_{t-1} dy_{t-1}ᵀ
//   It writes what flows into the end of every second chunk, which products.cuh starts from, and dL/dH_0.
// Shapes: recurrence.cuh's Inputs; dy [B, S, H, V]; states as forward.cuh saves them; gradients [units, H, saved state]
//   fp32, a unit being two chunks; dfinal_state, dinitial_state [n, H, K, V] fp32.
// Tiling: a block is one sequence and head. RB of its 3 RB warps walk the gradient back, 16 rows each. The others compute
//   s_t again from the chunks' saved states, two chunks at a time, one round ahead, and stage the inputs. One barrier a
//   round of two chunks.
// Registers: a walking warp's lane holds V / 4 of G and Wᵀ as right operand. Shared memory: `GradientShared`.
// Bound: latency and issue. The chain is a multiply-add, a multiply, a conversion and a product a step; with the warps that
//   compute s, about 120 instructions a step and 16 rows on each scheduler: 218 cycles at V = 16.
#pragma once

#include "m2rnn/recurrence.cuh"

namespace nam56r::m2rnn {

struct GradientArguments {
  Inputs in;
  Rows dy;                    // data may be null: zero
  const float* states;
  const float* dfinal_state;  // may be null: zero
  float* gradients;
  float* dinitial_state;
};

template <typename T, int V, int RB, int C>
struct GradientShared {
  using S = typename Recurrence<T, V>::Z;
  S s[2][kUnit][C][RB][32];
  Vectors<T, RB * 16, C> q[3][kUnit], k[2][kUnit];
  Vectors<T, V, C> dy[3][kUnit], v[2][kUnit];
  Forgets<C> f[3][kUnit];
};

template <typename T, int V, int RB, int C>
__global__ void __launch_bounds__(RB * 96, 1) gradient(const GradientArguments a) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<GradientShared<T, V, RB, C>*>(memory);
  using Walk = Recurrence<T, V>;
  const Inputs& in = a.in;
  const int lane = threadIdx.x % 32, block = threadIdx.x / 32 % RB, head = blockIdx.x % in.heads;
  const Sequence s = sequence_number(in, blockIdx.x / in.heads, C);
  const long long first_unit = sequence_number(in, s.index, C * kUnit).chunk;
  const int rounds = (s.chunks + kUnit - 1) / kUnit;
  const float* weight = in.weight + (long long)head * V * V;

  if (threadIdx.x < RB * 32) {
    using Operand = typename Precision<T>::Gradient;
    const Weight<Operand, V> transposed(weight, lane, true, kUnscale);  // s is kScale times as large
    const long long state_at = ((long long)s.index * in.heads + head) * in.keys * V;
    Tile<V> g;
    load_state<V>(g, a.dfinal_state ? a.dfinal_state + state_at : nullptr, block, in.keys, lane);
    __syncthreads();
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
      const int now = round % 3, unit = rounds - 1 - round;
      save<V, RB>(a.gradients, g, first_unit + unit, head, in.heads, block, lane);
#pragma unroll 1
      for (int part = kUnit - 1; part >= 0; --part) {
        if (unit * kUnit + part >= s.chunks) continue;
        // While a step's product is on its way, the next step's slope and outer product are made from older loads.
        constexpr int kRun = Run<V, C>::value, kUnroll = Run<V, C>::kUnroll;
        const auto slopes = shared.s[round % 2][part];
        const auto& q = shared.q[now][part];
        const auto& dy = shared.dy[now][part];
        const auto& f = shared.f[now][part];
        typename Walk::Z packed;
        Tile<V> slope, outer = {};
        Outer<T, V> next(q, dy, C - kRun, block, lane);
        load_registers(packed, slopes[C - 1][block], lane);
        Walk::Operand::template floats<V>(slope, packed);
        load_registers(packed, slopes[C > 1 ? C - 2 : 0][block], lane);
        next.add(g, kRun - 1, lane);
        if (kRun > 1) next.add(outer, kRun - 2, lane);
        float fade = f.x[C - 1];
#pragma unroll 1
        for (int run = C - kRun; run >= 0; run -= kRun) {
          const Outer<T, V> here = next;
          if (run > 0) next = Outer<T, V>(q, dy, run - kRun, block, lane);
#pragma unroll kUnroll
          for (int j = kRun - 1; j >= 0; --j) {
            const int step = run + j;
            Tile<V> p, back;
#pragma unroll
            for (int n = 0; n < V / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                p[n][i] = g[n][i] * slope[n][i];
                back[n][i] = outer[n][i];
                outer[n][i] = 0;
              }
            typename Operand::template A<V> left;
            Operand::template left<V>(left, p);
            transposed.multiply(back, left);
            Walk::Operand::template floats<V>(slope, packed);
            load_registers(packed, slopes[max(step - 2, 0)][block], lane);
            if (j >= 2) here.add(outer, j - 2, lane);
            else if (run > 0) next.add(outer, kRun + j - 2, lane);
            const float old_fade = fade;
            fade = f.x[max(step - 1, 0)];
#pragma unroll
            for (int n = 0; n < V / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) g[n][i] = fmaf(old_fade, g[n][i], back[n][i]);
          }
        }
      }
      __syncthreads();
    }
    store_state<V>(a.dinitial_state + state_at, g, block, in.keys, lane);
    return;
  }

  const int part = threadIdx.x / (RB * 32) - 1, thread = threadIdx.x % (RB * 32);
  Walk walk(weight, lane);
  Ahead<T, V, RB, C, RB * 32, 2> ahead;
  Tile<V> h;
  const auto chunk_of = [&](int round) { return (rounds - 1 - round) * kUnit + part; };
  const auto there = [&](int round) { return round < rounds && chunk_of(round) < s.chunks; };
  const auto load = [&](int round) {
    if (round < rounds) ahead.load(in, a.dy, s, head, chunk_of(round) * C, thread);
  };
  const auto load_first = [&](int round) {
    if (there(round)) load_saved<V, RB>(h, a.states, s.chunk + chunk_of(round), head, in.heads, block, lane);
  };
  const auto stage = [&](int round) {
    const int now = round % 2, later = round % 3;  // what walks the chunk, and what the gradient takes a round later
    ahead.store(
        shared.q[later][part], shared.k[now][part], shared.v[now][part], shared.dy[later][part], shared.f[later][part],
        thread);
  };
  load_first(0);
  load(0);
  stage(0);
  __syncthreads();
  for (int round = 0; round <= rounds; ++round) {  // one round before the walking warps' own
    load(round + 1);
    if (there(round)) walk.start(h);
    load_first(round + 1);
    if (there(round)) {
      const auto keep = [&](int step, const auto& x, auto& added, const auto&, float fade) {
        const float scaled = scaled_rest(fade);
#pragma unroll
        for (int n = 0; n < V / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) added[n][i] = fmaf(-added[n][i], x[n][i], scaled);
        typename Walk::Z slope;
        Walk::Operand::template left<V>(slope, added);
        store_registers(shared.s[round % 2][part][step][block], slope, lane);
      };
      walk.chunk(
          shared.k[round % 2][part], shared.v[round % 2][part], shared.f[round % 3][part], block, lane, keep);
    }
    stage(round + 1);
    __syncthreads();
  }
}

}  // namespace nam56r::m2rnn
