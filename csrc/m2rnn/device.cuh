// Device code that the kernels of M²RNN share: element types, tiles of a state in registers, matrix products.
//
// These headers include nothing but each other: NVRTC compiles them at run time for what isn't built ahead.
//
// A warp holds 16 rows of a state, V columns wide, as the accumulators of mma.m16n8: lane 4 g + t has, in block j of 8
// columns, the columns 8 j + 2 t and 8 j + 2 t + 1 of row g (x[j][0], x[j][1]) and of row g + 8 (x[j][2], x[j][3]).
// Packed to 16 bits these registers are the next product's A operand as they stand. For tf32, whose A operand has
// columns t and t + 4 of a block, the contraction runs over the columns in another order: t for 2 t, t + 4 for 2 t + 1.
#pragma once

namespace nam56r::m2rnn {

struct BFloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

__device__ inline float to_float(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ inline float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline float to_float(float x) { return x; }

__device__ inline void put(BFloat16* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ inline void put(Float16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ inline void put(float* to, float x) { *to = x; }

template <int V> using Tile = float[V / 8][4];

// 16-bit pairs, the first in the low half.
struct HalfPair {
  __device__ static unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  __device__ static float2 unpack(unsigned pair) {
    float2 x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
  }
  __device__ static void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  __device__ static void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
  }
};

struct BrainPair {
  __device__ static unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  __device__ static float2 unpack(unsigned pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  __device__ static void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  __device__ static void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
  }
};

__device__ inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x as the sum of two tf32 numbers, to 2^-22 of x.
struct Split {
  unsigned high, low;
  __device__ explicit Split(float x) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(x - __uint_as_float(high)));
  }
};

// Operands of D[16, V] += A[16, V] B[V, 8 n]. Each operand policy has A<V> (the left operand), Column<V> (8 columns of the
// right one, as lane 4 g + t holds them: rows 8 i + 2 t and 8 i + 2 t + 1 of column g), `left`, `column` and `multiply`.

template <typename Pair>
struct Operand16 {
  template <int V> struct alignas(16) A { unsigned x[V / 8][2]; };
  template <int V> struct Column { unsigned x[V / 8]; };

  template <int V>
  __device__ static void left(A<V>& a, const Tile<V>& tile) {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) a.x[j][i] = Pair::pack(tile[j][2 * i], tile[j][2 * i + 1]);
  }
  template <int V>
  __device__ static void floats(Tile<V>& tile, const A<V>& a) {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = Pair::unpack(a.x[j][i]);
        tile[j][2 * i] = pair.x, tile[j][2 * i + 1] = pair.y;
      }
  }
  template <int V>
  __device__ static void column(Column<V>& b, const float (&x)[V / 8][2]) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) b.x[i] = Pair::pack(x[i][0], x[i][1]);
  }
  template <int V>
  __device__ static void multiply(float (&d)[4], const A<V>& a, const Column<V>& b) {
#pragma unroll
    for (int i = 0; i < V / 8; i += 2)
      Pair::mma(d, a.x[i][0], a.x[i][1], a.x[i + 1][0], a.x[i + 1][1], b.x[i], b.x[i + 1]);
  }
};

// Four terms (high and low halves) give the accuracy of fp32; one term is tf32.
template <int kTerms>
struct OperandTf32 {
  template <int V> struct alignas(16) A { float x[V / 8][4]; };
  template <int V> struct Column { float x[V / 8][2]; };

  template <int V>
  __device__ static void left(A<V>& a, const Tile<V>& tile) {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.x[j][i] = tile[j][i];
  }
  template <int V>
  __device__ static void floats(Tile<V>& tile, const A<V>& a) {
#pragma unroll
    for (int j = 0; j < V / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[j][i] = a.x[j][i];
  }
  template <int V>
  __device__ static void column(Column<V>& b, const float (&x)[V / 8][2]) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) b.x[i][0] = x[i][0], b.x[i][1] = x[i][1];
  }
  template <int V>
  __device__ static void multiply(float (&d)[4], const A<V>& a, const Column<V>& b) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      const Split b0(b.x[i][0]), b1(b.x[i][1]), a0(a.x[i][0]), a1(a.x[i][2]), a2(a.x[i][1]), a3(a.x[i][3]);
      const unsigned high[4] = {a0.high, a1.high, a2.high, a3.high}, low[4] = {a0.low, a1.low, a2.low, a3.low};
      if (kTerms == 4) {
        float sum[4] = {};
        mma_tf32(sum, low, b0.low, b1.low);
        mma_tf32(sum, low, b0.high, b1.high);
        mma_tf32(sum, high, b0.low, b1.low);
        mma_tf32(sum, high, b0.high, b1.high);
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] += sum[e];  // the tensor cores cut off where this rounds
      } else {
        mma_tf32(d, high, b0.high, b1.high);
      }
    }
  }
};

// What each input type computes with. Forward: the operands of Z W; |Z| <= 1, so that fp16 has range enough and rounds
// little (W is taken as fp16: up to 65504). `kApart`: products are added by the CUDA cores, which round where the tensor
// cores cut off. Gradient: operands of any size; bf16 for bf16 inputs, tf32 for fp16 (same digits, more range).
template <typename T> struct Precision;
template <> struct Precision<BFloat16> {
  using Pair = BrainPair;
  static constexpr bool kApart = false;
  using Forward = Operand16<HalfPair>;
  using Gradient = Operand16<BrainPair>;
  // MUFU's approximation, 2^-11 of the result: an eighth of bf16's rounding
  __device__ static float tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
template <> struct Precision<Float16> {
  using Pair = HalfPair;
  static constexpr bool kApart = true;
  using Forward = Operand16<HalfPair>;
  using Gradient = OperandTf32<1>;
  // near zero the difference would lose its digits
  __device__ static float tanh(float x) {
    const float near = fmaf(x * x, x * (-1.f / 3), x), far = 1.f - __fdividef(2.f, 1.f + __expf(2.f * x));
    return fabsf(x) < 0.04f ? near : far;
  }
};
template <> struct Precision<float> {
  static constexpr bool kApart = false;  // OperandTf32<4> does so itself
  using Forward = OperandTf32<4>;
  using Gradient = OperandTf32<4>;
  __device__ static float tanh(float x) { return ::tanhf(x); }
};

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Matrices of 8 rows of 16 bytes, row i of matrix m at lane 8 m + i's address, of 16-bit elements: lane 4 g + t gets
// elements 2 t and 2 t + 1 of row g, or (`kTransposed`) element g of rows 2 t and 2 t + 1.
template <bool kTransposed>
__device__ inline void load_matrices(unsigned (&x)[4], const void* row) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
template <bool kTransposed>
__device__ inline void load_matrices(unsigned (&x)[2], const void* row) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
}

// A tile kept in memory by one warp, in the order of the registers: 16 bytes a lane and access.
template <typename A>
__device__ inline void store_registers(void* to, const A& a, int lane) {
  constexpr int kParts = sizeof(A) / 16;
  const uint4* from = reinterpret_cast<const uint4*>(&a);
#pragma unroll
  for (int i = 0; i < kParts; ++i) static_cast<uint4*>(to)[i * 32 + lane] = from[i];
}
template <typename A>
__device__ inline void load_registers(A& a, const void* from, int lane) {
  constexpr int kParts = sizeof(A) / 16;
  uint4* to = reinterpret_cast<uint4*>(&a);
#pragma unroll
  for (int i = 0; i < kParts; ++i) to[i] = static_cast<const uint4*>(from)[i * 32 + lane];
}

}  // namespace nam56r::m2rnn
