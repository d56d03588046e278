// How products.cuh keeps tiles in shared memory for products over their rows.
#pragma once

#include "m2rnn/recurrence.cuh"

namespace nam56r::m2rnn {

// One column of 8 that is kept; the others are zero.
template <typename Column>
__device__ inline Column only_if(bool kept, const Column& column) {
  Column to;
#pragma unroll
  for (int i = 0; i < int(sizeof(Column) / 4); ++i) {
    unsigned word;
    memcpy(&word, reinterpret_cast<const char*>(&column) + 4 * i, 4);
    word = kept ? word : 0;
    memcpy(reinterpret_cast<char*>(&to) + 4 * i, &word, 4);
  }
  return to;
}

// How a tile [16, V] of H or P lies in shared memory: written from the registers of a left operand, read as a tile or,
// transposed, as operands of a product over its 16 rows.
template <typename Operand, int V> struct Kept;

// fp32, in the registers' order.
template <int kTerms, int V>
struct Kept<OperandTf32<kTerms>, V> {
  using Operand = OperandTf32<kTerms>;
  float x[V / 8][32][4];

  __device__ void put(const typename Operand::template A<V>& a, int lane) { store_registers(x, a, lane); }
  __device__ void get(Tile<V>& tile, int lane) const {
    typename Operand::template A<V> a;
    load_registers(a, x, lane);
    Operand::template floats<V>(tile, a);
  }
  __device__ float at(int row, int column) const {
    return x[column / 8][row % 8 * 4 + column % 8 / 2][row / 8 * 2 + column % 2];
  }
  __device__ void left(typename Operand::template A<16>& a, int first, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) a.x[i][e] = at(8 * i + lane % 4 * 2 + e % 2, first + lane / 4 + e / 2 * 8);
  }
  __device__ void columns(typename Operand::template Column<16> (&b)[2], int first, int lane) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) b[n].x[i][e] = at(8 * i + lane % 4 * 2 + e, first + 8 * n + lane / 4);
  }
};

// bf16, row by row in pieces of 8 columns, which are swapped about so that 8 rows of a piece lie in different banks.
template <int V>
struct Kept<Operand16<BrainPair>, V> {
  using Operand = Operand16<BrainPair>;
  uint4 x[16][V / 8];

  __device__ static int piece(int row, int column) { return column ^ ((row * (V / 8) / 8) & (V / 8 - 1)); }
  // A lane's row for load_matrices: pieces `column` and `column` + 1, of each first the upper 8 rows, then the lower 8.
  __device__ const uint4* across(int column, int lane) const {
    return &x[lane % 16][piece(lane % 16, column + lane / 16)];
  }
  __device__ void put(const typename Operand::template A<V>& a, int lane) {
#pragma unroll
    for (int j = 0; j < V / 8; j += 2) {
#if __CUDA_ARCH__ >= 900
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(across(j, lane))),
                   "r"(a.x[j][0]), "r"(a.x[j][1]), "r"(a.x[j + 1][0]), "r"(a.x[j + 1][1])
                   : "memory");
#else
#pragma unroll
      for (int i = 0; i < 4; ++i)
        (&x[lane / 4 + i % 2 * 8][piece(lane / 4 + i % 2 * 8, j + i / 2)].x)[lane % 4] = a.x[j + i / 2][i % 2];
#endif
    }
  }
  __device__ void get(Tile<V>& tile, int lane) const {
#pragma unroll
    for (int j = 0; j < V / 8; j += 2) {
      unsigned pairs[4];
      load_matrices<false>(pairs, across(j, lane));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = BrainPair::unpack(pairs[i]);
        tile[j + i / 2][i % 2 * 2] = pair.x, tile[j + i / 2][i % 2 * 2 + 1] = pair.y;
      }
    }
  }
  __device__ void left(typename Operand::template A<16>& a, int first, int lane) const {
    const int row = lane / 16 * 8 + lane % 8;
    unsigned pairs[4];
    load_matrices<true>(pairs, &x[row][piece(row, first / 8 + lane / 8 % 2)]);
#pragma unroll
    for (int i = 0; i < 4; ++i) a.x[i / 2][i % 2] = pairs[i];
  }
  __device__ void columns(typename Operand::template Column<16> (&b)[2], int first, int lane) const {
    unsigned pairs[4];
    load_matrices<true>(pairs, across(first / 8, lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].x[i % 2] = pairs[i];
  }
};

}  // namespace nam56r::m2rnn
