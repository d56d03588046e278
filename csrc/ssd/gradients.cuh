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
  p.blocks = max(1, int(a.P) / P);
  p.span = blockIdx.y;
  p.sequence = a.cu ? at<const int>(a.sequence_of)[p.span] : int(p.span / a.spans);
  if (p.sequence >= a.sequences) return p;
  p.seq = sequence(a, p.sequence);
  p.chunk = int((p.span - first_span(a, p.sequence)) * a.every);
  p.chunks = min(int(a.every), (p.seq.length + chunk_tokens - 1) / chunk_tokens - p.chunk);
  return p;
}

// Sets, then adds to, a sum over a span that this thread alone writes: so in one order, and without waiting for it.
__device__ inline void add(float* to, float x, bool set) {
  if (set)
    *to = x;
  else
    asm volatile("red.global.add.f32 [%0], %1;" :: "l"(to), "f"(x) : "memory");
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

// The gradient of q's or k's rows is made in two halves of two pieces of N / 4 columns: `half` 0 is what is turned, for
// MIMO with its partner in the other piece.
template <class Sh>
__device__ constexpr int piece(int half, int i) {
  return Sh::MODEL == kMimo ? half * (Sh::N / 4) + i * (Sh::N / 2) : half * (Sh::N / 2) + i * (Sh::N / 4);
}

// acc: both pieces of half 0 of a tile's rows, [16] a warp. Undoes the turn in acc, and leaves the angles' gradient in
// turned[row][angle]. b: the warp's block of rows.
template <class Sh>
__device__ __forceinline__ void turn_back(
    float (&acc)[2][Sh::N / 32][4], int b, const Tile<Sh::ROWS, Sh::N>& tile, const Turns<Sh>& turns,
    float (&turned)[Sh::ROWS][Sh::NA + 4]) {
  using Two = Pair<typename Sh::T>;
  constexpr int N = Sh::N;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
  if constexpr (Sh::MODEL == kMimo) {
#pragma unroll
    for (int j = 0; j < N / 32; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = b * 16 + row + 8 * e, t = r % Sh::CT, c = j * 8 + col;
        const float2 cos = *reinterpret_cast<const float2*>(&turns.cos[t][c]);
        const float2 sin = *reinterpret_cast<const float2*>(&turns.sin[t][c]);
        const float2 x = Two::unpack(tile.pair(r, c)), y = Two::unpack(tile.pair(r, c + N / 2));
        float(&u)[4] = acc[0][j], (&v)[4] = acc[1][j];
        *reinterpret_cast<float2*>(&turned[r][c]) = {
            x.x * v[2 * e] - y.x * u[2 * e], x.y * v[2 * e + 1] - y.y * u[2 * e + 1]};
        const float2 back = {u[2 * e] * cos.x + v[2 * e] * sin.x, u[2 * e + 1] * cos.y + v[2 * e + 1] * sin.y};
        v[2 * e] = v[2 * e] * cos.x - u[2 * e] * sin.x, v[2 * e + 1] = v[2 * e + 1] * cos.y - u[2 * e + 1] * sin.y;
        u[2 * e] = back.x, u[2 * e + 1] = back.y;
      }
  } else if constexpr (Sh::MODEL == kSiso) {
#pragma unroll
    for (int j = 0; j < N / 16; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = b * 16 + row + 8 * e, t = r % Sh::CT, c = j * 8 + col;
        const float cos = turns.cos[t][c / 2], sin = turns.sin[t][c / 2];
        const float2 x = Two::unpack(tile.pair(r, c));
        float(&from)[4] = acc[j / (N / 32)][j % (N / 32)];
        float &u = from[2 * e], &v = from[2 * e + 1];
        turned[r][c / 2] = x.x * v - x.y * u;
        const float back = u * cos + v * sin;
        v = v * cos - u * sin, u = back;
      }
  }
}

// Adds a half to the gradient of B or C, and leaves the sums of its columns, the bias's gradient, in bias[N].
template <class Sh>
__device__ __forceinline__ void add_half(
    float (&sum)[2][Sh::N / 32][4], const float (&acc)[2][Sh::N / 32][4], int half, float* bias) {
  constexpr int kBlocks = Sh::N / 32;  // of 8 columns, of a piece
  const int col = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[i / kBlocks][i % kBlocks][e] += acc[i / kBlocks][i % kBlocks][e];
  if constexpr (Sh::kTurns)
#pragma unroll
    for (int four = 0; four < 2 * kBlocks; four += 4) {
      float columns[8] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (four + i < 2 * kBlocks)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float(&from)[4] = acc[(four + i) / kBlocks][(four + i) % kBlocks];
            columns[2 * i + e] = from[e] + from[e + 2];
          }
      const float all = fold(columns);
      const int i = four + folded() / 2;
      if (i < 2 * kBlocks) bias[piece<Sh>(half, i / kBlocks) + i % kBlocks * 8 + col + folded() % 2] = all;
    }
}

// Accumulators [16][16 k and on] as the A operand of a product that sums over their columns.
template <typename T>
__device__ __forceinline__ void operand(unsigned (&to)[4], const float (&left)[4], const float (&right)[4]) {
  to[0] = Pair<T>::pack(left[0], left[1]), to[1] = Pair<T>::pack(left[2], left[3]);
  to[2] = Pair<T>::pack(right[0], right[1]), to[3] = Pair<T>::pack(right[2], right[3]);
}

// Copies a state [P][N] into shared memory.
template <class Sh, int THREADS>
__device__ __forceinline__ void copy_state(Tile<P, Sh::N>& to, const typename Sh::T* from, int width) {
  constexpr int kUnits = Sh::N / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < P * kUnits; i += THREADS)
    copy16(to.unit(i / kUnits, i % kUnits * 8), from + i * 8, i / kUnits < width);
}

// The state of the next chunk, 16 of its rows a warp of one warpgroup: decay * state + a b, where a [16][ROWS] is the
// warp's and b is q or k.
template <class Sh>
__device__ __forceinline__ void next_state(
    typename Sh::T* to, const Tile<P, Sh::N>& state, float decay, const unsigned (&a)[Sh::NB][4],
    const Tile<Sh::ROWS, Sh::N>& b, int width) {
  using Two = Pair<typename Sh::T>;
  constexpr int N = Sh::N;
  const int lane = threadIdx.x % 32, p = threadIdx.x / 32 % 4 * 16 + lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; n += 32) {
    float acc[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 f = Two::unpack(state.pair(p + 8 * e, n + j * 8 + col));
        acc[j][2 * e] = f.x * decay, acc[j][2 * e + 1] = f.y * decay;
      }
    start();
#pragma unroll
    for (int c = 0; c < Sh::NB; ++c)
      Product<typename Sh::T, 32>::template held<kAlong>(acc, a[c], b.descriptor(c * 16, n));
    finish();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (p + 8 * e < width)
          *reinterpret_cast<unsigned*>(to + (p + 8 * e) * N + n + j * 8 + col) = Two::pack(acc[j][2 * e], acc[j][2 * e + 1]);
  }
}

// The angles' gradients of one head's chunk, from `turned`: sums over ranks, then over the chunk's later tokens.
// Every thread has the angle and the tokens that it had in Angles.
template <class Sh>
__device__ void angle_gradients(
    const Angles<Sh>& angle, const float (&turned)[Sh::ROWS][Sh::NA + 4], const Decays<Sh>& decays, float* dangle, bool set,
    float* total, float (&by_token)[4][Sh::CT], int live) {
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
    if (t < live) add(dangle + t * Sh::NA + index, decays.dt[t] * all, set);
    float sum = tanhf(angle.raw[i]) * all;
#pragma unroll
    for (int d = SEG; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 / SEG == 0) by_token[threadIdx.x / 32][t] = sum;
  }
}

// Stores a half of a warp's 16 rows of the gradient of B or C.
template <class Sh>
__device__ void store_half(
    const float (&acc)[2][Sh::N / 32][4], int half, void* to, bool whole, int per_token, int per_rank, int b, int live) {
  using Two = Pair<typename Sh::T>;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int r = b * 16 + row + 8 * e, t = r % Sh::CT;
    if (t >= live) continue;
    const int from = t * per_token + r / Sh::CT * per_rank + col;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Sh::N / 32; ++j) {
        const int on = from + piece<Sh>(half, i) + 8 * j;
        const float x = acc[i][j][2 * e], y = acc[i][j][2 * e + 1];
        if (whole)
          *reinterpret_cast<unsigned*>(at<typename Sh::T>(to) + on) = Two::pack(x, y);
        else
          *reinterpret_cast<float2*>(at<float>(to) + on) = {x, y};
      }
  }
}

}  // namespace nam56r::ssd
