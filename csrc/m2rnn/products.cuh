// What: every gradient but the state's own, from the states and gradients at the units' bounds. With P_t and G_t as in
//   gradient.cuh: dq_t = H_t dy_t, dk_t = P_t v_t, dv_t = P_tᵀ k_t, df_t = Σ G_t ⊙ (H_{t-1} - Z_t), dW = Σ_t H_{t-1}ᵀ P_t.
// Shapes: recurrence.cuh's Inputs; dv [B, S, H, V]; dforget [B, S, H] fp32; in fp32, to be added by reduce.cuh: dweight
//   [units, H, V, V]; dq, dk [units, groups, runs, threads] over the heads of a group, four sums of a thread together.
// Tiling: a block is one unit (two chunks of C steps) and one group of heads that share q and k, which it takes one after
//   the other, last chunk first. Its RB warps hold 16 rows of the state each. For each chunk they (a) walk the recurrence
//   from the chunk's saved state, keep Z_t and kScale H_{t-1} in shared memory, and add H_t dy_t; (b) walk the gradient back, put
//   P_t in Z_t's place, and add P_t v_t and df_t; (c) share out the steps and multiply P_tᵀ by H_{t-1} and k_t over all rows.
//   A product with one vector a step is made for 8 steps at once: step j's vector is column j of the right operand, whose
//   other columns are zero, and the 8 results gather in one accumulator. No atomics: every sum has a fixed order.
// Registers: V / 4 each of H, Z, G, and W or Wᵀ as right operand. Shared memory: `ProductsShared`.
// Bound: issue, about 230 instructions a step and 16 rows, over all chunks and heads at once; 12 warps an SM, which is what
//   shared memory and registers allow, issue in 58 % of the cycles.
#pragma once

#include "m2rnn/kept.cuh"

namespace nam56r::m2rnn {

struct ProductArguments {
  Inputs in;
  Rows dy;
  const float *states, *gradients;
  void* dv;
  float* dforget;
  float4 *dq, *dk;
  float* dweight;
  int shared_heads, heads_a_block;  // heads that share q and k; how many of them a block takes
};

// How many warps share a chunk's steps in (c), where a warp takes 16 columns at a time: a power of two, as C is.
template <int V, int RB, int C>
struct Parts {
  static constexpr int kWarps = RB * 16 / V;
  static constexpr int kMost = kWarps >= 8 ? 8 : kWarps >= 4 ? 4 : kWarps >= 2 ? 2 : 1;
  static constexpr int value = kMost < C ? kMost : C;
};

template <typename T, int V, int RB, int C>
struct ProductsShared {
  using Z = typename Recurrence<T, V>::Z;
  using Kept = m2rnn::Kept<typename Precision<T>::Gradient, V>;
  static constexpr int kParts = Parts<V, RB, C>::value;
  // blocks that an SM should hold, where registers and (for bf16) shared memory allow more than one
  static constexpr int kResident = RB * V > 64 ? 1 : sizeof(Kept) == 32 * V ? 3 : 2;
  union Slot {
    Z z[32];
    Kept p;
    __device__ Slot() {}
  };
  Slot zp[C][RB];
  union {
    Kept h[C][RB];
    float dweight[kParts][V][V];  // once a head is done
  };
  union {
    Vectors<T, RB * 16, C> q;
    float dv[C][V];  // in (c)
  };
  Vectors<T, RB * 16, C> k;
  Vectors<T, V, C> v, dy;
  Forgets<C> f;
  float dforget[C][RB];
  __device__ ProductsShared() {}
};

template <typename T, int V, int RB, int C>
__global__ void __launch_bounds__(RB * 32, ProductsShared<T, V, RB, C>::kResident) products(const ProductArguments a) {
  extern __shared__ __align__(16) char memory[];
  using Shared = ProductsShared<T, V, RB, C>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  using Walk = Recurrence<T, V>;
  using Operand = typename Precision<T>::Gradient;
  using Left = typename Operand::template A<V>;
  using Column = typename Operand::template Column<V>;
  constexpr int kRun = Run<V, C>::value, kUnroll = Run<V, C>::kUnroll, kParts = Shared::kParts, kThreads = RB * 32;
  constexpr int kItems = V / 16 * kParts, kEach = (kItems + RB - 1) / RB;  // in (c), a warp's
  const Inputs& in = a.in;
  const int thread = threadIdx.x, lane = thread % 32, block = thread / 32, g8 = lane / 4, t4 = lane % 4;
  const int blocks_a_segment = (a.shared_heads + a.heads_a_block - 1) / a.heads_a_block;
  const int groups = in.heads / a.shared_heads * blocks_a_segment;
  const int group = blockIdx.x % groups;
  const long long unit_number = blockIdx.x / groups;
  const int segment = group / blocks_a_segment, within = group % blocks_a_segment * a.heads_a_block;
  const int head_first = segment * a.shared_heads + within;
  const int head_last = segment * a.shared_heads + min(within + a.heads_a_block, a.shared_heads);
  const Sequence units = sequence_of_chunk(in, unit_number, C * kUnit);
  const Sequence s = sequence_number(in, units.index, C);
  const int unit = int(unit_number - units.chunk);
  const bool there = unit >= 0 && unit < units.chunks;  // a bad cu_seqlens may number a unit before them
  const int chunk_last = min(unit * kUnit + kUnit, s.chunks) - 1;

  // where a lane keeps the sums of a run's steps over the group's heads
  const auto sums_at = [&](int part, int run) {
    return (((unit_number * groups + group) * kUnit + part) * (C / kRun) + run / kRun) * (RB * 32) + thread;
  };
  Ahead<T, V, RB, C, kThreads, 2> ahead;  // of the next chunk, while the block works on this one
  const auto load = [&](int head, int chunk) {
    ahead.load(in, a.dy, s, head, chunk * C, thread);
    prefetch_saved<V, RB>(a.states, s.chunk + chunk, head, in.heads, block, lane);
  };
  if (there) load(head_first, chunk_last);
  for (int head = head_first; head < head_last; ++head) {
    float dweight[kEach][V / 8][4] = {};
    const float* weight = in.weight + (long long)head * V * V;
    Walk walk(weight, lane);
    const Weight<Operand, V> transposed(weight, lane, true);
    Tile<V> g;
    if (there) load_saved<V, RB>(g, a.gradients, unit_number, head, in.heads, block, lane);
    for (int chunk = chunk_last; there && chunk >= unit * kUnit; --chunk) {
      const int first = chunk * C, part = chunk - unit * kUnit;
      ahead.store(shared.q, shared.k, shared.v, shared.dy, shared.f, thread);
      Tile<V> h;
      load_saved<V, RB>(h, a.states, s.chunk + chunk, head, in.heads, block, lane);
      if (chunk > unit * kUnit) load(head, chunk - 1);
      else if (head + 1 < head_last) load(head + 1, chunk_last);
      __syncthreads();

      {  // (a)
        walk.start(h);
        Left left;
        Operand::template left<V>(left, h);
#pragma unroll 1
        for (int run = 0; run < C; run += kRun) {
          const Outer<T, V> outer(shared.k, shared.v, run, block, lane);
          Column dy;
          Columns<T, Operand, V>::load(dy, shared.dy, 0, run, lane);
          float dq[4] = {};
          float4* const sums = a.dq + sums_at(part, run);
          const float4 others = head > head_first ? *sums : float4{};
#pragma unroll kUnroll < 2 ? kUnroll : 2
          for (int j = 0; j < kRun; ++j) {
            const int step = run + j;
            const float fade = shared.f.x[step];
            shared.h[step][block].put(left, lane);
            Tile<V> kv = {}, x, rest;
            outer.add(kv, j, lane);
            typename Walk::Z z, operand;
            walk.step(x, rest, operand, kv, fade);
            Walk::Operand::template left<V>(z, x);
            store_registers(shared.zp[step][block].z, z, lane);
#pragma unroll
            for (int n = 0; n < V / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) h[n][i] = fmaf(fade, h[n][i], rest[n][i]);
            Operand::template left<V>(left, h);
            Operand::template multiply<V>(dq, left, only_if(g8 == j, dy));
          }
          *sums = {
              fmaf(dq[0], kUnscale, others.x), fmaf(dq[1], kUnscale, others.y), fmaf(dq[2], kUnscale, others.z),
              fmaf(dq[3], kUnscale, others.w)};
        }
      }
      __syncwarp();
      {  // (b)
#pragma unroll 1
        for (int run = C - kRun; run >= 0; run -= kRun) {
          const Outer<T, V> outer(shared.q, shared.dy, run, block, lane);
          outer.add(g, kRun - 1, lane);
          Column v;
          Columns<T, Operand, V>::load(v, shared.v, 0, run, lane);
          float dk[4] = {}, dforget[8] = {};
          float4* const sums = a.dk + sums_at(part, run);
          const float4 others = head > head_first ? *sums : float4{};
#pragma unroll kUnroll
          for (int j = kRun - 1; j >= 0; --j) {
            const int step = run + j;
            const float fade = shared.f.x[step], rest = 1.f - fade;
            typename Walk::Z packed;
            load_registers(packed, shared.zp[step][block].z, lane);
            Tile<V> z, p;
            float sum = 0;
            Walk::Operand::template floats<V>(z, packed);
            shared.h[step][block].get(h, lane);
#pragma unroll
            for (int n = 0; n < V / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                sum = fmaf(g[n][i], fmaf(h[n][i], kUnscale, -z[n][i]), sum);
                p[n][i] = g[n][i] * fmaf(-z[n][i] * rest, z[n][i], rest);
              }
#pragma unroll
            for (int i = 0; i < 8; ++i) dforget[i] = i == j ? sum : dforget[i];
            Left left;
            Operand::template left<V>(left, p);
            Tile<V> back = {};
            if (j > 0) outer.add(back, j - 1, lane);
            transposed.multiply(back, left);
#pragma unroll
            for (int n = 0; n < V / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) g[n][i] = fmaf(fade, g[n][i], back[n][i]);
            __syncwarp();  // Z_t is read by all lanes before P_t takes its place
            shared.zp[step][block].p.put(left, lane);
            Operand::template multiply<V>(dk, left, only_if(g8 == j, v));
          }
          *sums = {others.x + dk[0], others.y + dk[1], others.z + dk[2], others.w + dk[3]};
          const int which = sum_rows(dforget, lane);
          dforget[0] += __shfl_xor_sync(~0u, dforget[0], 2);
          dforget[0] += __shfl_xor_sync(~0u, dforget[0], 1);
          if (t4 == 0 && which < kRun) shared.dforget[run + which][block] = dforget[0];
        }
      }
      __syncthreads();

      // (c): a warp takes 16 columns of P and a part of the steps.
      constexpr int kSteps = C / kParts, kSet = kSteps < 8 ? kSteps : 8;
#pragma unroll
      for (int each = 0; each < kEach; ++each) {
        const int item = block + each * RB, column = item % (V / 16) * 16, from = item / (V / 16) * kSteps;
        if (item >= kItems) break;
#pragma unroll 1
        for (int set = from; set < from + kSteps; set += kSet) {
          float dv[4] = {};
#pragma unroll 1
          for (int r = 0; r < RB; ++r) {
            typename Operand::template Column<16> k;
            Columns<T, Operand, 16>::load(k, shared.k, r * 16, set, lane);
#pragma unroll
            for (int j = 0; j < kSet; ++j) {
              typename Operand::template A<16> p;
              shared.zp[set + j][r].p.left(p, column, lane);
              Operand::template multiply<16>(dv, p, only_if(g8 == j, k));
#pragma unroll
              for (int n = 0; n < V / 8; n += 2) {
                typename Operand::template Column<16> before[2];
                shared.h[set + j][r].columns(before, 8 * n, lane);
                Operand::template multiply<16>(dweight[each][n], p, before[0]);
                Operand::template multiply<16>(dweight[each][n + 1], p, before[1]);
              }
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (2 * t4 + i % 2 < kSet) shared.dv[set + 2 * t4 + i % 2][column + g8 + i / 2 * 8] = dv[i];
        }
      }
      __syncthreads();
      T* const dv = static_cast<T*>(a.dv) + ((s.batch * in.length + s.begin + first) * in.heads + head) * V;
      for (int i = thread; i < C * V; i += kThreads)
        if (first + i / V < s.length) put(dv + (long long)(i / V) * in.heads * V + i % V, shared.dv[i / V][i % V]);
      if (thread < C && first + thread < s.length) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < RB; ++r) sum += shared.dforget[thread][r];
        a.dforget[(s.batch * in.length + s.begin + first + thread) * in.heads + head] = sum;
      }
      __syncthreads();
    }
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
      const int item = block + each * RB, column = item % (V / 16) * 16;
      if (item >= kItems) break;
#pragma unroll
      for (int n = 0; n < V / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared.dweight[item / (V / 16)][8 * n + 2 * t4 + i % 2][column + g8 + i / 2 * 8] = dweight[each][n][i];
    }
    __syncthreads();
    for (int i = thread; i < V * V; i += kThreads) {
      float sum = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) sum += (&shared.dweight[p][0][0])[i];
      a.dweight[(unit_number * in.heads + head) * V * V + i] = sum * kUnscale;
    }
    __syncthreads();
  }
}

}  // namespace nam56r::m2rnn
