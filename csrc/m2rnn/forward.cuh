// What: the M²RNN scan, y_t = H_tᵀ q_t, with the final state, and each chunk's first state where a backward will follow.
// Shapes: recurrence.cuh's Inputs; y [B, S, H, V]; final_state, initial_state [n, H, K, V] fp32; states [chunks, H, saved
//   state] fp32, kScale H.
// Tiling: a block is one sequence and head. Of its 2 RB warps (RB = K / 16), RB walk the recurrence, 16 rows of the state
//   each, and write Z to shared memory; RB follow one chunk of C steps behind, build H from Z, and multiply by q. They also
//   stage the next chunk's inputs. One barrier a chunk.
// Registers: a walking warp's lane holds V / 4 elements each of U and Z W, and W as right operand (V² / 64 words); a
//   following one's V / 4 of H. Shared memory: `ForwardShared`.
// Bound: latency. A step's chain is V / 4 tanh a lane (8 cycles each on the special-function unit), a scaling, a
//   conversion, a product and an addition: about 175 cycles at V = 16. The following warps share the schedulers: 223. Where
//   there are more blocks than SMs it is the issue of instructions. docs/notes/m2rnn.md has the measurements.
#pragma once

#include "m2rnn/recurrence.cuh"

namespace nam56r::m2rnn {

struct ForwardArguments {
  Inputs in;
  const float* initial_state;  // may be null: zero
  void* y;
  float* final_state;
  float* states;  // may be null: not saved
};

template <typename T, int V, int RB, int C>
struct ForwardShared {
  using Z = typename Recurrence<T, V>::Z;
  Z z[2][C][RB][32];
  Vectors<T, RB * 16, C> q[3], k[3];
  Vectors<T, V, C> v[3];
  Forgets<C> f[3];
  float y[C][RB][V];
};

template <typename T, int V, int RB, int C>
__global__ void __launch_bounds__(RB * 64) forward(const ForwardArguments a) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<T, V, RB, C>*>(memory);
  using Walk = Recurrence<T, V>;
  const Inputs& in = a.in;
  const int lane = threadIdx.x % 32, block = threadIdx.x / 32 % RB, head = blockIdx.x % in.heads;
  const Sequence s = sequence_number(in, blockIdx.x / in.heads, C);
  const long long state_at = ((long long)s.index * in.heads + head) * in.keys * V;
  const float* initial = a.initial_state ? a.initial_state + state_at : nullptr;
  Tile<V> h;
  load_state<V>(h, initial, block, in.keys, lane, kScale);

  if (threadIdx.x < RB * 32) {
    Walk walk(in.weight + (long long)head * V * V, lane);
    walk.start(h);
    __syncthreads();
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      const int now = chunk % 3;
      const auto keep = [&](int step, const auto& x, const auto&, const auto&, float) {
        typename Walk::Z z;
        Walk::Operand::template left<V>(z, x);
        store_registers(shared.z[chunk % 2][step][block], z, lane);
      };
      walk.chunk(shared.k[now], shared.v[now], shared.f[now], block, lane, keep);
      __syncthreads();
    }
    return;
  }

  constexpr int kSet = C < 64 / V ? C : 64 / V, kThreads = RB * 32;  // steps whose sums over rows are made together
  const int thread = threadIdx.x - kThreads;
  T* const y = static_cast<T*>(a.y) + ((s.batch * in.length + s.begin) * in.heads + head) * V;
  Ahead<T, V, RB, C, kThreads, 1> ahead;
  const auto load = [&](int chunk) { ahead.load(in, in.v, s, head, chunk * C, thread); };
  const auto stage = [&](int chunk) {
    const int to = chunk % 3;
    ahead.store(shared.q[to], shared.k[to], shared.v[to], shared.v[to], shared.f[to], thread);
  };
  load(0);
  stage(0);
  __syncthreads();
  for (int chunk = -1; chunk < s.chunks; ++chunk) {  // the chunk before the walking warps' own
    load(chunk + 2);
    if (chunk >= 0) {
      const int now = chunk % 3;
      if (a.states) save<V, RB>(a.states, h, s.chunk + chunk, head, in.heads, block, lane);
#pragma unroll 1
      for (int set = 0; set < C; set += kSet) {
        float sums[kSet * V / 4];
#pragma unroll
        for (int i = 0; i < kSet; ++i) {
          typename Walk::Z packed;
          Tile<V> z;
          load_registers(packed, shared.z[chunk % 2][set + i][block], lane);
          Walk::Operand::template floats<V>(z, packed);
          const float f = shared.f[now].x[set + i], scaled = scaled_rest(f);
#pragma unroll
          for (int j = 0; j < V / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) h[j][e] = fmaf(scaled, z[j][e], f * h[j][e]);
          const T* rows = &shared.q[now].x[set + i][block * 16 + lane / 4];
          const float2 q = {to_float(rows[0]), to_float(rows[8])};
#pragma unroll
          for (int j = 0; j < V / 4; ++j)
            sums[i * V / 4 + j] = fmaf(q.x, h[j / 2][j % 2], q.y * h[j / 2][j % 2 + 2]);
        }
        const int first = sum_rows(sums, lane);
#pragma unroll
        for (int i = 0; i < (kSet * V + 31) / 32; ++i) {
          const int step = (first + i) / (V / 4), j = (first + i) % (V / 4);
          shared.y[set + step][block][j / 2 * 8 + lane % 4 * 2 + j % 2] = sums[i];
        }
      }
      asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
#pragma unroll
      for (int i = 0; i < (C * V + kThreads - 1) / kThreads; ++i) {
        const int at = thread + i * kThreads, step = at / V, column = at % V;
        if (step >= C || chunk * C + step >= s.length) break;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < RB; ++r) sum += shared.y[step][r][column];
        put(y + (long long)(chunk * C + step) * in.heads * V + column, sum * kUnscale);
      }
    }
    stage(chunk + 2);
    if (chunk + 1 < s.chunks) __syncthreads();
  }
  store_state<V>(a.final_state + state_at, h, block, in.keys, lane, kUnscale);
}

}  // namespace nam56r::m2rnn
