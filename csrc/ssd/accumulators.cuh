// What `gradient` makes of its accumulators: turned back, summed over ranks, rows and tokens, stored.
#pragma once

#include "ssd/sums.cuh"
#include "ssd/tiles.cuh"

namespace nam56r::ssd {

// Of Tile::columns: a chunk of eight tokens has them twice, with other ranks, which are added.
__device__ __forceinline__ void both_halves(float2 (&of_tokens)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    of_tokens[e].x += of_tokens[e + 1].x, of_tokens[e].y += of_tokens[e + 1].y;
    of_tokens[e + 1] = of_tokens[e];
  }
}

// What is turned back of a tile: the angles' gradient in every row; rows padded so that neighbours lie in different banks.
template <class Sh>
using Turned = float[ROWS][Sh::NA + 4];

// Undoes the turn in a warp's 16 rows of the gradient of q or k; leaves the angles' gradient in turned.
template <class Sh>
__device__ __forceinline__ void turn_back(
    float (&d)[Sh::N / 8][4], int first, const Tile<ROWS, Sh::N>& tile, const Turns<Sh>& turns,
    float2 (&turned)[2][Sh::NA / 8]) {
  using Two = Pair<typename Sh::T>;
  constexpr int N = Sh::N;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int r = first + row + 8 * e, t = r % Sh::CT;
    if constexpr (Sh::MODEL == kMimo) {
#pragma unroll
      for (int j = 0; j < N / 32; ++j) {
        const int c = j * 8 + col;
        const uint2 turn = *reinterpret_cast<const uint2*>(&turns.x[t][Turns<Sh>::at(c)]);
        const float2 f = Turns<Sh>::unpack(turn.x), g = Turns<Sh>::unpack(turn.y);
        const float2 x = Two::unpack(tile.pair(r, c)), y = Two::unpack(tile.pair(r, c + N / 2));
        float *u = &d[j][2 * e], *v = &d[j + N / 16][2 * e];
        turned[e][j] = {x.x * v[0] - y.x * u[0], x.y * v[1] - y.y * u[1]};
        const float2 back = {u[0] * f.x + v[0] * f.y, u[1] * g.x + v[1] * g.y};
        v[0] = v[0] * f.x - u[0] * f.y, v[1] = v[1] * g.x - u[1] * g.y;
        u[0] = back.x, u[1] = back.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        const int c = j * 8 + col;
        const float2 f = Turns<Sh>::unpack(turns.x[t][Turns<Sh>::at(c / 2)]), x = Two::unpack(tile.pair(r, c));
        float &u = d[j][2 * e], &v = d[j][2 * e + 1];
        (j % 2 ? turned[e][j / 2].y : turned[e][j / 2].x) = x.x * v - x.y * u;
        const float back = u * f.x + v * f.y;
        v = v * f.x - u * f.y, u = back;
      }
    }
  }
}

// Where turn_back's lie in turned: pairs of angles, of SISO four apart.
template <class Sh>
__device__ __forceinline__ void put_turned(Turned<Sh>& turned, int first, const float2 (&from)[2][Sh::NA / 8]) {
  const int lane = threadIdx.x % 32, row = first + lane / 4, t = lane % 4;
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int j = 0; j < Sh::NA / 8; ++j) {
      if constexpr (Sh::MODEL == kMimo)
        *reinterpret_cast<float2*>(&turned[row + 8 * e][j * 8 + 2 * t]) = from[e][j];
      else
        turned[row + 8 * e][j * 8 + t] = from[e][j].x, turned[row + 8 * e][j * 8 + 4 + t] = from[e][j].y;
    }
}

// The sums of the columns of a warp's 16 rows: the bias's gradient. A warp has one of max(R, 4) rows of it, at 8 ranks two.
// `room` is the warp's: 16 rows of turned.
template <class Sh>
__device__ __forceinline__ void add_bias(const float (&d)[Sh::N / 8][4], float* of_unit, float* room) {
  constexpr int kRows = Sh::R > 4 ? 2 : 1, WIDE = Sh::N / 2, AT = WIDE + 8, EACH = WIDE / 32 > 1 ? WIDE / 32 : 1;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < Sh::N; n += WIDE) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < WIDE / 8; ++i) {
        const float(&from)[4] = d[n / 8 + i];
        *reinterpret_cast<float2*>(&room[row * AT + i * 8 + col]) =
            kRows == 2 ? float2{from[2 * r], from[2 * r + 1]} : float2{from[0] + from[2], from[1] + from[3]};
      }
      __syncwarp();
      float part[8][EACH], sum[EACH];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* from = &room[i * AT + (WIDE >= 32 ? lane : lane % WIDE) * EACH];
        if constexpr (EACH == 1)
          part[i][0] = *from;
        else
#pragma unroll
          for (int e = 0; e < EACH; e += 2) {
            const float2 two = *reinterpret_cast<const float2*>(from + e);
            part[i][e] = two.x, part[i][e + 1] = two.y;
          }
      }
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        sum[e] = ((part[0][e] + part[1][e]) + (part[2][e] + part[3][e])) + ((part[4][e] + part[5][e]) + (part[6][e] + part[7][e]));
      float* to = of_unit + (warp * kRows + r) * Sh::N + n + lane * EACH;
      if constexpr (EACH == 1)
        add(to, sum[0], WIDE >= 32 || lane < WIDE);
      else
#pragma unroll
        for (int e = 0; e < EACH; e += 2) add(to + e, float2{sum[e], sum[e + 1]});
    }
  __syncwarp();
}

// The angles' gradients of a chunk and head: summed over ranks and both sides, then over the chunk's later tokens. Every
// thread of a warpgroup has two angles; PARTS threads share them, LONG tokens each.
template <class Sh>
struct AngleGradients {
  static constexpr int kAll = 256 / Sh::NA, PARTS = kAll < Sh::CT ? kAll : Sh::CT, LONG = Sh::CT / PARTS;
  static constexpr int kWarps = (Sh::NA / 2 * PARTS + 31) / 32;  // that have angles
  float2 bend[LONG];  // tanh(angle)

  __device__ static bool mine() { return kAll == PARTS || index() < Sh::NA; }
  __device__ static int part() { return threadIdx.x % PARTS; }
  __device__ static int index() { return threadIdx.x % 128 / PARTS * 2; }
  __device__ static int token(int i) { return part() * LONG + i; }

  // `bends` at the chunk's first token.
  __device__ __forceinline__ void load(const float* bends, int per_token, int live) {
    if (!mine()) return;
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      const float* from = bends + token(i) * per_token + index();
      bend[i] = token(i) < live ? float2{from[0], from[1]} : float2{};
    }
  }

  // Adds to dangle (or sets it) at the chunk's first token; by_token gets each warp's part of a token's step's gradient.
  __device__ __forceinline__ void sum(
      const Turned<Sh>& q, const Turned<Sh>& k, const Decays<Sh>& decays, float* dangle, bool set, float* total,
      float (&by_token)[4][Sh::CT], int live) const {
    wait_at(kTurned, 256);
    float2 c[LONG];
    if (mine())
#pragma unroll
      for (int i = LONG - 1; i >= 0; --i) {
        float2 of_q[Sh::R], of_k[Sh::R];
#pragma unroll
        for (int r = 0; r < Sh::R; ++r) {
          const int row = r * Sh::CT + token(i);
          of_q[r] = *reinterpret_cast<const float2*>(&q[row][index()]), of_k[r] = *reinterpret_cast<const float2*>(&k[row][index()]);
        }
        c[i] = i + 1 < LONG ? c[i + 1] : float2{};
#pragma unroll
        for (int r = 0; r < Sh::R; ++r) c[i].x += of_q[r].x + of_k[r].x, c[i].y += of_q[r].y + of_k[r].y;
      }
    arrive_at(kRead, 256);
    if (!mine()) return;
    float2 after = c[0];
#pragma unroll
    for (int d = 1; d < PARTS; d *= 2) {
      const float2 other = {__shfl_down_sync(~0u, after.x, d, PARTS), __shfl_down_sync(~0u, after.y, d, PARTS)};
      if (part() + d < PARTS) after.x += other.x, after.y += other.y;
    }
    if (part() == 0) *reinterpret_cast<float2*>(total + index()) = after;
    after.x -= c[0].x, after.y -= c[0].y;
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      const float2 all = {c[i].x + after.x, c[i].y + after.y};
      const float dt = decays.dt()[token(i)];
      const float2 by_step = {dt * all.x, dt * all.y};
      float* to = dangle + token(i) * Sh::NA + index();
      if (token(i) < live) {
        if (set) *reinterpret_cast<float2*>(to) = by_step;
        else add(to, by_step);
      }
      float of_token = bend[i].x * all.x + bend[i].y * all.y;
#pragma unroll
      for (int d = PARTS; d < 32; d *= 2) of_token += __shfl_xor_sync(~0u, of_token, d);
      if (threadIdx.x % 32 / PARTS == 0) by_token[threadIdx.x / 32 % 4][token(i)] = of_token;
    }
  }
};

// Stores a warp's 16 rows of the gradient of B or C.
template <class Sh>
__device__ void store_rows(
    const float (&d)[Sh::N / 8][4], void* to, bool whole, int per_token, int per_rank, int first, int live) {
  using T = typename Sh::T;
  const int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int r = first + row + 8 * e, t = r % Sh::CT;
    if (t >= live) continue;
    const int from = t * per_token + r / Sh::CT * per_rank + col;
#pragma unroll
    for (int j = 0; j < Sh::N / 8; ++j) {
      if (whole)
        *reinterpret_cast<unsigned*>(at<T>(to) + from + 8 * j) = Pair<T>::pack(d[j][2 * e], d[j][2 * e + 1]);
      else
        *reinterpret_cast<float2*>(at<float>(to) + from + 8 * j) = {d[j][2 * e], d[j][2 * e + 1]};
    }
  }
}

}  // namespace nam56r::ssd
