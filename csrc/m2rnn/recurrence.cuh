// The walk that every kernel of M²RNN but the reduction takes.
//
//   Z_t = tanh(H_{t-1} W + k_t v_tᵀ)      H_t = f_t H_{t-1} + (1 - f_t) Z_t
//
// The walk carries U_t = H_t W instead of H_t, both in fp32: U_t = f_t U_{t-1} + (1 - f_t) Z_t W. So the product's operand
// is (1 - f_t) Z_t, and H stays off the critical path: between one tanh and the next are one scaling, one conversion, one
// product and one multiply-add. Where f is near 1, (1 - f_t) Z_t would fall below what fp16 tells apart: it is carried
// kScale times as large, and with it U and H.
#pragma once

#include "m2rnn/inputs.cuh"

namespace nam56r::m2rnn {

constexpr float kScale = 1024, kUnscale = 1 / kScale;

// kScale (1 - f)
__device__ inline float scaled_rest(float f) { return fmaf(-kScale, f, kScale); }

// Steps that are taken together: a matrix product makes 8 steps' products with one vector each, see Outer and Columns.
template <int V, int C>
struct Run {
  static constexpr int value = C < 8 ? C : 8;
  static constexpr int kUnroll = V == 16 ? 8 : V == 32 ? 2 : 1;  // wide states: enough work a step, and seconds to compile
};

// The outer products of a run's steps, k_t v_tᵀ or q_t dy_tᵀ. The contraction of mma.m16n8k8 runs over the 8 steps, with all
// but one of the right operand's zero: exact products, for one load in 8 steps.
template <typename T, int V>
struct Outer {
  using Pair = typename Precision<T>::Pair;
  unsigned a[2], b[V / 16][2];

  template <int N, int C>
  __device__ Outer(const Vectors<T, N, C>& rows, const Vectors<T, V, C>& columns, int run, int block, int lane) {
    const int step = min(run + lane % 8, C - 1), half = lane / 8 % 2 * 8;
    load_matrices<true>(a, &rows.x[step][block * 16 + half]);
#pragma unroll
    for (int j = 0; j < V / 16; ++j) load_matrices<true>(b[j], &columns.x[step][j * 16 + half]);
  }
  // d += the outer product of the run's step `step`
  __device__ void add(Tile<V>& d, int step, int lane) const {
    const unsigned mask = lane % 4 == step / 2 ? (step % 2 ? 0xffff0000u : 0x0000ffffu) : 0;
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
      Pair::mma(d[j], a[0] & mask, a[1] & mask, b[j / 2][j % 2] & mask);  // both: an inf times zero is no zero
  }
};

template <int V>
struct Outer<float, V> {
  const float *row, *column;
  int row_pitch, column_pitch;

  template <int N, int C>
  __device__ Outer(const Vectors<float, N, C>& rows, const Vectors<float, V, C>& columns, int run, int block, int lane)
      : row(&rows.x[run][block * 16 + lane / 4]), column(&columns.x[run][lane % 4 * 2]),
        row_pitch(sizeof(rows.x[0]) / 4), column_pitch(sizeof(columns.x[0]) / 4) {}
  __device__ void add(Tile<V>& d, int step, int lane) const {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        d[j][i] = fmaf(row[step * row_pitch + i / 2 * 8], column[step * column_pitch + 8 * j + i % 2], d[j][i]);
  }
};

// A run's vectors as the columns of a right operand: column j is the vector of step `run` + j, elements from `first` on.
template <typename T, typename Operand, int M>
struct Columns {
  template <int N, int C>
  __device__ static void load(
      typename Operand::template Column<M>& to, const Vectors<T, N, C>& from, int first, int run, int lane) {
    const int step = min(run + lane % 8, C - 1);
    float values[M / 8][2];
#pragma unroll
    for (int i = 0; i < M / 8; i += 2) {
      unsigned pairs[2];
      load_matrices<false>(pairs, &from.x[step][first + 8 * i + lane / 8 % 2 * 8]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 pair = Precision<T>::Pair::unpack(pairs[e]);
        values[i + e][0] = pair.x, values[i + e][1] = pair.y;
      }
    }
    Operand::template column<M>(to, values);  // 16-bit operands of T's own type: the same bits again
  }
};
template <typename Operand, int M>
struct Columns<float, Operand, M> {
  template <int N, int C>
  __device__ static void load(
      typename Operand::template Column<M>& to, const Vectors<float, N, C>& from, int first, int run, int lane) {
    float values[M / 8][2];
#pragma unroll
    for (int i = 0; i < M / 8; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) values[i][e] = from.x[min(run + lane / 4, C - 1)][first + 8 * i + lane % 4 * 2 + e];
    Operand::template column<M>(to, values);
  }
};

// The right operand of H W (or of P Wᵀ): all V columns of W.
template <typename Operand, int V>
struct Weight {
  typename Operand::template Column<V> x[V / 8];
  __device__ Weight(const float* w, int lane, bool transposed = false, float scale = 1) {
#pragma unroll
    for (int n = 0; n < V / 8; ++n) {
      float values[V / 8][2];
#pragma unroll
      for (int i = 0; i < V / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * i + lane % 4 * 2 + e, column = 8 * n + lane / 4;
          values[i][e] = scale * (transposed ? w[column * V + row] : w[row * V + column]);
        }
      Operand::template column<V>(x[n], values);
    }
  }
  __device__ void multiply(Tile<V>& d, const typename Operand::template A<V>& a) const {
#pragma unroll
    for (int n = 0; n < V / 8; ++n) Operand::template multiply<V>(d[n], a, x[n]);
  }
};

// d += H W with H in fp32's accuracy and W as the operand has it.
template <int V>
__device__ inline void multiply_state(Tile<V>& d, const Tile<V>& h, const Weight<Operand16<HalfPair>, V>& w) {
#pragma unroll
  for (int i = 0; i < V / 8; ++i) {
    const Split a0(h[i][0]), a1(h[i][2]), a2(h[i][1]), a3(h[i][3]);
    const unsigned high[4] = {a0.high, a1.high, a2.high, a3.high}, low[4] = {a0.low, a1.low, a2.low, a3.low};
#pragma unroll
    for (int n = 0; n < V / 8; ++n) {
      const float2 b = HalfPair::unpack(w.x[n].x[i]);  // fp16 numbers are tf32 numbers
      mma_tf32(d[n], low, __float_as_uint(b.x), __float_as_uint(b.y));
      mma_tf32(d[n], high, __float_as_uint(b.x), __float_as_uint(b.y));
    }
  }
}
template <int V>
__device__ inline void multiply_state(Tile<V>& d, const Tile<V>& h, const Weight<OperandTf32<4>, V>& w) {
  typename OperandTf32<4>::A<V> a;
  OperandTf32<4>::left<V>(a, h);
  w.multiply(d, a);
}

template <typename T, int V>
struct Recurrence {
  using Operand = typename Precision<T>::Forward;
  using Z = typename Operand::template A<V>;
  const Weight<Operand, V> weight;
  Tile<V> u;  // kScale U

  __device__ Recurrence(const float* w, int lane) : weight(w, lane) {}

  // h is kScale H.
  __device__ void start(const Tile<V>& h) {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) u[j][i] = 0;
    multiply_state(u, h, weight);
  }

  // x = Z_t, rest = kScale (1 - f_t) Z_t as a product's operand and added = the same in fp32; kv = k_t v_tᵀ
  __device__ void step(Tile<V>& x, Tile<V>& added, Z& rest, const Tile<V>& kv, float f) {
    const float scaled = scaled_rest(f);
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[j][i] = Precision<T>::tanh(fmaf(u[j][i], kUnscale, kv[j][i]));
        added[j][i] = scaled * x[j][i];
      }
    Operand::template left<V>(rest, added);
    Tile<V> product = {};
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) u[j][i] *= f;
    weight.multiply(Precision<T>::kApart ? product : u, rest);
    if (Precision<T>::kApart) {
#pragma unroll
      for (int j = 0; j < V / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) u[j][i] += product[j][i];
    }
  }

  // The steps of a chunk: kv is made a step ahead. Calls f(step, x, added, rest, f_t) after each: see `step`.
  template <int N, int C, typename F>
  __device__ void chunk(
      const Vectors<T, N, C>& k, const Vectors<T, V, C>& v, const Forgets<C>& forget, int block, int lane, F f) {
    constexpr int kRun = Run<V, C>::value, kUnroll = Run<V, C>::kUnroll;
    Outer<T, V> next(k, v, 0, block, lane);
    Tile<V> kv = {};
    next.add(kv, 0, lane);
    float fade = forget.x[0];
#pragma unroll 1
    for (int run = 0; run < C; run += kRun) {
      const Outer<T, V> now = next;
      if (run + kRun < C) next = Outer<T, V>(k, v, run + kRun, block, lane);
#pragma unroll kUnroll
      for (int j = 0; j < kRun; ++j) {
        Tile<V> ahead = {};
        if (j + 1 < kRun) now.add(ahead, j + 1, lane);
        else next.add(ahead, 0, lane);
        const float next_fade = forget.x[min(run + j + 1, C - 1)];
        Tile<V> x, added;
        Z rest;
        step(x, added, rest, kv, fade);
        f(run + j, x, added, rest, fade);
        fade = next_fade;
#pragma unroll
        for (int n = 0; n < V / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) kv[n][i] = ahead[n][i];
      }
    }
  }
};

// Sums over the 8 lanes that share columns: each pair of lanes halves the sums that it makes, until N / 8, or one, are left.
// They are then in sums[0 ..]; gives the first one's number.
template <int N>
__device__ inline int sum_rows(float (&sums)[N], int lane) {
  int first = 0, count = N;
#pragma unroll
  for (int mask = 16; mask >= 4; mask /= 2) {
    if (count > 1) {
      const bool upper = lane & mask;
      count /= 2;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (i < count) {
          const float send = upper ? sums[i] : sums[i + count], keep = upper ? sums[i + count] : sums[i];
          sums[i] = keep + __shfl_xor_sync(~0u, send, mask);
        }
      }
      first += upper ? count : 0;
    } else {
      sums[0] += __shfl_xor_sync(~0u, sums[0], mask);
    }
  }
  return first;
}

// A state [K, V] in memory, times `scale`: element of row block `block`; rows past K are zero and aren't written.
template <int V>
__device__ inline void load_state(Tile<V>& h, const float* from, int block, int keys, int lane, float scale = 1) {
#pragma unroll
  for (int j = 0; j < V / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = block * 16 + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      h[j][i] = from && row < keys ? scale * from[row * V + column] : 0.f;
    }
}
template <int V>
__device__ inline void store_state(float* to, const Tile<V>& h, int block, int keys, int lane, float scale = 1) {
#pragma unroll
  for (int j = 0; j < V / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = block * 16 + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      if (row < keys) to[row * V + column] = scale * h[j][i];
    }
}

// The same in the registers' order and as it is, for states that only these kernels read: [.., RB, V / 8, 32 lanes, 4].
template <int V, int RB>
__device__ inline float4* saved_state(float* states, long long slot, int head, int heads, int block, int lane) {
  return reinterpret_cast<float4*>(states) + ((slot * heads + head) * RB + block) * (V / 8 * 32) + lane;
}
template <int V, int RB>
__device__ inline void load_saved(
    Tile<V>& h, const float* states, long long slot, int head, int heads, int block, int lane) {
  const float4* from = saved_state<V, RB>(const_cast<float*>(states), slot, head, heads, block, lane);
#pragma unroll
  for (int j = 0; j < V / 8; ++j) {
    const float4 four = from[j * 32];
    h[j][0] = four.x, h[j][1] = four.y, h[j][2] = four.z, h[j][3] = four.w;
  }
}
template <int V, int RB>
__device__ inline void prefetch_saved(const float* states, long long slot, int head, int heads, int block, int lane) {
  const float4* from = saved_state<V, RB>(const_cast<float*>(states), slot, head, heads, block, lane);
#pragma unroll
  for (int j = 0; j < V / 8; ++j) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + j * 32));
}
template <int V, int RB>
__device__ inline void save(
    float* states, const Tile<V>& h, long long slot, int head, int heads, int block, int lane) {
  float4* to = saved_state<V, RB>(states, slot, head, heads, block, lane);
#pragma unroll
  for (int j = 0; j < V / 8; ++j) to[j * 32] = {h[j][0], h[j][1], h[j][2], h[j][3]};
}

}  // namespace nam56r::m2rnn
