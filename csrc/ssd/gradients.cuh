// What the two gradient kernels share: where a block works, column sums, the turn undone, sums over ranks and angles.
//
// Both give a block (a group's heads, or some of them; a span of chunks) and walk its chunks, and in each chunk the heads
// one after the other, so that the gradient of C or B, a sum over heads, stays in registers: 16 rows of N a warp. The
// state of every head goes from chunk to chunk through `carried`.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

struct Place {
  int sequence, group, split, blocks, chunk, chunks;  // first chunk, and how many; 0: nothing to do
  long long span;
  Sequence seq;
};

__device__ inline Place place(const Arguments& a, int chunk_tokens) {
  Place p{};
  p.group = blockIdx.x / int(a.splits), p.split = blockIdx.x % int(a.splits);
  p.blocks = int(a.splits * a.units / a.heads_per_group);
  p.span = blockIdx.y;
  p.sequence = a.cu ? at<const int>(a.sequence_of)[p.span] : int(p.span / a.spans);
  if (p.sequence >= a.sequences) return p;
  p.seq = sequence(a, p.sequence);
  p.chunk = int((p.span - first_span(a, p.sequence)) * a.every);
  p.chunks = min(int(a.every), (p.seq.length + chunk_tokens - 1) / chunk_tokens - p.chunk);
  return p;
}

// Sums v[i] over the eight lanes of a column; lane / 4 then tells which i is returned: folded().
__device__ inline float fold(float (&v)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half; half /= 2) {
    const bool high = lane & 4 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = high ? v[i + half] : v[i], send = high ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(~0u, send, 4 * half);
    }
  }
  return v[0];
}
__device__ inline int folded() { return threadIdx.x % 32 / 4; }

__device__ inline float over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Columns of the i-th of four blocks of 8 that are made together: MIMO's partners, N / 2 apart, are blocks 0, 2 and 1, 3.
template <class Sh>
__device__ constexpr int column_of(int group, int i) {
  return Sh::MODEL == kMimo ? group * 16 + i % 2 * 8 + i / 2 * (Sh::N / 2) : group * 32 + i * 8;
}

// acc: four blocks of the gradient of a turned tile's rows [16]. Undoes the turn in acc, and leaves the angles' gradient
// in turned[row][angle]. b: the warp's block of rows.
template <class Sh>
__device__ void turn_back(
    float (&acc)[4][4], int group, int b, const Tile<Sh::ROWS, Sh::N>& tile, const Turns<Sh>& turns,
    float (&turned)[Sh::ROWS][Sh::NA + 4]) {
  using Two = Pair<typename Sh::T>;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
  if constexpr (Sh::MODEL == kMimo) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = column_of<Sh>(group, i);
      if (c >= Sh::N / 4) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = b * 16 + row + 8 * e, t = r % Sh::CT;
        const float2 cos = *reinterpret_cast<const float2*>(&turns.cos[t][c + col]);
        const float2 sin = *reinterpret_cast<const float2*>(&turns.sin[t][c + col]);
        const float2 x = Two::unpack(tile.pair(r, c + col)), y = Two::unpack(tile.pair(r, c + col + Sh::N / 2));
        float(&u)[4] = acc[i], (&v)[4] = acc[i + 2];
        const float2 d = {x.x * v[2 * e] - y.x * u[2 * e], x.y * v[2 * e + 1] - y.y * u[2 * e + 1]};
        *reinterpret_cast<float2*>(&turned[r][c + col]) = d;
        const float2 back = {u[2 * e] * cos.x + v[2 * e] * sin.x, u[2 * e + 1] * cos.y + v[2 * e + 1] * sin.y};
        v[2 * e] = v[2 * e] * cos.x - u[2 * e] * sin.x, v[2 * e + 1] = v[2 * e + 1] * cos.y - u[2 * e + 1] * sin.y;
        u[2 * e] = back.x, u[2 * e + 1] = back.y;
      }
    }
  } else if constexpr (Sh::MODEL == kSiso) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = column_of<Sh>(group, i);
      if (c >= Sh::N / 2) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = b * 16 + row + 8 * e, t = r % Sh::CT;
        const float cos = turns.cos[t][(c + col) / 2], sin = turns.sin[t][(c + col) / 2];
        const float2 x = Two::unpack(tile.pair(r, c + col));
        float& u = acc[i][2 * e], & v = acc[i][2 * e + 1];
        turned[r][(c + col) / 2] = x.x * v - x.y * u;
        const float back = u * cos + v * sin;
        v = v * cos - u * sin, u = back;
      }
    }
  }
}

// The angles' gradients of one head's chunk, from `turned`: sums over ranks, then over the chunk's later tokens.
// Every thread has the angle and the tokens that it had in Angles.
template <class Sh>
__device__ void angle_gradients(
    const Angles<Sh>& angle, const float (&turned)[Sh::ROWS][Sh::NA + 4], float (&dangle)[Angles<Sh>::LONG], float* total,
    float* per_head, float (&by_token)[4][Sh::CT], int live) {
  if (!Angles<Sh>::mine()) return;
  constexpr int LONG = Angles<Sh>::LONG, SEG = Angles<Sh>::SEG;
  const int index = Angles<Sh>::index();
  float c[LONG];
#pragma unroll
  for (int i = LONG - 1; i >= 0; --i) {
    const int t = Angles<Sh>::token(i);
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < Sh::R; ++r) sum += turned[r * Sh::CT + t][index];
    c[i] = sum + (i + 1 < LONG ? c[i + 1] : 0.f);
  }
  float after = c[0];
#pragma unroll
  for (int d = 1; d < SEG; d *= 2) {
    const float other = __shfl_down_sync(~0u, after, d, SEG);
    if (threadIdx.x % SEG + d < SEG) after += other;
  }
  if (threadIdx.x % SEG == 0) total[index] = after;
  after -= c[0];
#pragma unroll
  for (int i = 0; i < LONG; ++i) {
    const int t = Angles<Sh>::token(i);
    const float all = c[i] + after;
    if (per_head) {
      if (t < live) per_head[t * Sh::NA + index] = angle.dt[i] * all;
    } else {
      dangle[i] += angle.dt[i] * all;
    }
    float sum = Angles<Sh>::tanh_(angle.raw[i]) * all;
#pragma unroll
    for (int d = SEG; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 / SEG == 0) by_token[threadIdx.x / 32][t] = sum;
  }
}

// Stores a warp's 16 rows [16][N] of the gradient of B or C.
template <class Sh>
__device__ void store_rows(
    const float (&acc)[Sh::N / 8][4], void* to, bool whole, int per_token, int per_rank, int b, int live) {
  using Two = Pair<typename Sh::T>;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int r = b * 16 + row + 8 * e, t = r % Sh::CT;
    if (t >= live) continue;
    const int from = t * per_token + r / Sh::CT * per_rank + col;
#pragma unroll
    for (int j = 0; j < Sh::N / 8; ++j) {
      const float x = acc[j][2 * e], y = acc[j][2 * e + 1];
      if (whole)
        *reinterpret_cast<unsigned*>(at<typename Sh::T>(to) + from + 8 * j) = Two::pack(x, y);
      else
        *reinterpret_cast<float2*>(at<float>(to) + from + 8 * j) = {x, y};
    }
  }
}

// Adds or sets sums over a span that this block alone writes.
__device__ inline void add(float* to, float x, bool set) { *to = set ? x : *to + x; }

}  // namespace nam56r::ssd
