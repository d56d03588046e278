// A chunk in shared memory: rows of q or k, turned in place; the angles that turn them; x, z, dy and the decays.
//
// A chunk is CT = 16 TB tokens; its tiles have NB = R TB blocks of 16 rows, block r TB + tb: rank r's tokens 16 tb and on.
// So rank r of a token lies where rank 0 lies, one block further: sums over ranks stay in a thread, and the decays of a
// 16 x 16 block are the same for all R x R pairs of ranks.
#pragma once

#include "ssd/arguments.cuh"
#include "ssd/device.cuh"
#include "ssd/wgmma.cuh"

namespace nam56r::ssd {

constexpr int kMamba2 = 0, kSiso = 1, kMimo = 2;

constexpr int P = 64;  // columns of a unit; a head of 32 leaves the rest zero
constexpr float PI = 3.141592653589793f;

template <typename T_, int MODEL_, int R_, int N_>
struct Shape {
  using T = T_;
  static constexpr int MODEL = MODEL_, R = R_, N = N_;
  static constexpr int TB = R == 1 ? 4 : R == 2 ? 2 : 1, CT = 16 * TB, NB = R * TB, ROWS = 16 * NB, NA = N / 4;
  static constexpr bool kTurns = MODEL != kMamba2, kRanks = MODEL == kMimo;
  static constexpr int SEG = 128 / NA, LONG = CT / SEG;  // threads that share an angle, and tokens each takes
};

template <class Sh>
struct Turns {  // of a chunk; rows padded so that eight angles of neighbouring tokens lie in different banks
  float cos[Sh::kTurns ? Sh::CT : 1][Sh::NA + 4], sin[Sh::kTurns ? Sh::CT : 1][Sh::NA + 4];
};

template <class Sh>
struct Decays {
  float L[Sh::CT], w[Sh::CT], own[Sh::CT], dt[Sh::CT];  // L past the end is that of the last token
};

// Calls f(row, column) for all that this lane copies and turns of a chunk's rows: 8 columns from `column` on, and 8 from
// each of column + N / 2, and for MIMO + N / 4 and + 3 N / 4. What is turned is the first, for MIMO with the second.
// The eight lanes that access shared memory at a time have units in different banks.
template <class Sh, int WARPS, typename F>
__device__ __forceinline__ void over_rows(F f) {
  constexpr int kUnits = Sh::MODEL == kMimo ? Sh::N / 32 : Sh::N / 16, kRows = 32 / kUnits < 16 ? 32 / kUnits : 16;
  const int lane = threadIdx.x % 32, i = lane / kUnits, column = lane % kUnits * 8;
  const int row = kUnits == 4 ? i % 2 * 4 + i / 2 : kUnits == 2 ? i / 8 * 8 + i / 4 % 2 + i % 4 * 2 : i;
  constexpr int kPasses = Sh::ROWS / kRows;
#pragma unroll
  for (int n = 0; n < (kPasses + WARPS - 1) / WARPS; ++n) {
    const int pass = threadIdx.x / 32 % WARPS + n * WARPS;
    if ((kPasses % WARPS == 0 || pass < kPasses) && (kUnits > 1 || lane < 16)) f(pass * kRows + row, column);
  }
}

// Starts copying a chunk's rows of B or C; `from` is at its first token, `live` counts its tokens.
template <class Sh, int WARPS>
__device__ __forceinline__ void copy_rows(
    Tile<Sh::ROWS, Sh::N>& tile, const typename Sh::T* from, int per_token, int per_rank, int live) {
  constexpr int N = Sh::N;
  over_rows<Sh, WARPS>([&](int row, int column) {
    const int token = row % Sh::CT;
    const typename Sh::T* at_row = from + row / Sh::CT * per_rank + token * per_token + column;
    const auto copy = [&](int on) { copy16(tile.unit(row, column + on), at_row + on, token < live); };
    copy(0), copy(N / 2);
    if constexpr (Sh::MODEL == kMimo) copy(N / 4), copy(3 * N / 4);
  });
}

template <class Sh, int THREADS>
__device__ __forceinline__ void copy_tokens(
    Tile<Sh::CT, P>& tile, const typename Sh::T* from, int per_token, int live, int width) {
  constexpr int kUnits = Sh::CT * (P / 8);
#pragma unroll
  for (int n = 0; n < (kUnits + THREADS - 1) / THREADS; ++n) {
    const int i = threadIdx.x + n * THREADS, token = i / (P / 8), column = i % (P / 8) * 8;
    if (kUnits % THREADS == 0 || i < kUnits)
      copy16(tile.unit(token, column), from + token * per_token + column, token < live && column < width);
  }
}

// The same for the 16 columns from p0 on, by one warp.
template <class Sh>
__device__ __forceinline__ void copy_columns(
    Tile<Sh::CT, P>& tile, const typename Sh::T* from, int per_token, int live, int p0, int width) {
#pragma unroll
  for (int i = 0; i < Sh::TB; ++i) {
    const int lane = threadIdx.x % 32, token = i * 16 + lane / 2, column = p0 + lane % 2 * 8;
    copy16(tile.unit(token, column), from + token * per_token + column, token < live && column < width);
  }
}

template <class Sh>
__device__ __forceinline__ void copy_decays(
    Decays<Sh>& to, const Arguments& a, long long from, int live) {
  const int i = threadIdx.x % 128;
  if (i < Sh::CT) {
    copy4(&to.L[i], at<const float>(a.L) + from + min(i, live - 1), true);
    copy4(&to.w[i], at<const float>(a.W) + from + i, i < live);
    if (Sh::MODEL != kMamba2) {
      copy4(&to.own[i], at<const float>(a.OWN) + from + i, i < live);
      copy4(&to.dt[i], at<const float>(a.DT) + from + i, i < live);
    }
  }
}

template <class Sh>
__device__ float own_weight(const Decays<Sh>& d, int t) { return Sh::MODEL == kMamba2 ? d.w[t] : d.own[t]; }

template <typename T>
__device__ __forceinline__ void unpack8(float (&x)[8], uint4 v) {
  const unsigned u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = Pair<T>::unpack(u[i]);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return {Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]), Pair<T>::pack(x[4], x[5]), Pair<T>::pack(x[6], x[7])};
}
__device__ __forceinline__ uint4 get16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ void put16(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }
template <int n>
__device__ __forceinline__ void load(float (&x)[n], const float* from) {
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}

// What a tile's rows are turned by: the head's biases [R][N] of C and B.
template <class Sh>
struct Biases {
  float q[Sh::kTurns ? Sh::R : 1][Sh::N], k[Sh::kTurns ? Sh::R : 1][Sh::N];
};

template <class Sh, int THREADS>
__device__ __forceinline__ void copy_biases(Biases<Sh>& to, const Arguments& a, int head) {
  if constexpr (Sh::kTurns)
    for (int i = threadIdx.x * 4; i < Sh::R * Sh::N; i += THREADS * 4) {
      copy16(&to.q[0][i], at<const float>(a.C_bias) + head * Sh::R * Sh::N + i, true);
      copy16(&to.k[0][i], at<const float>(a.B_bias) + head * Sh::R * Sh::N + i, true);
    }
}

// Adds the biases and turns the rows of q, and of k if there is one, each lane those that it copied: no barrier between.
// kTogether loads both before it stores either: faster, in more registers.
template <class Sh, int WARPS, bool kTogether = false>
__device__ __forceinline__ void turn_rows(
    Tile<Sh::ROWS, Sh::N>& q, Tile<Sh::ROWS, Sh::N>* k, const Biases<Sh>& biases, const Turns<Sh>& turns) {
  using T = typename Sh::T;
  constexpr int N = Sh::N, kAngles = Sh::MODEL == kMimo ? 8 : 4, kPieces = Sh::MODEL == kMimo ? 4 : 2;
  constexpr int kOn[4] = {0, N / 2, N / 4, 3 * N / 4};
  if constexpr (Sh::kTurns)
    over_rows<Sh, WARPS>([&](int row, int column) {
      const int rank = row / Sh::CT, token = row % Sh::CT;
      float cos[kAngles], sin[kAngles];
      load(cos, &turns.cos[token][column * kAngles / 8]);
      load(sin, &turns.sin[token][column * kAngles / 8]);
      uint4 raw[kTogether ? 2 : 1][kPieces];
      const auto get = [&](int which) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) raw[kTogether * which][i] = get16((which ? *k : q).unit(row, column + kOn[i]));
      };
      get(0);
      if (kTogether && k) get(1);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (which && !k) break;
        if (which && !kTogether) get(1);
        Tile<Sh::ROWS, Sh::N>& tile = which ? *k : q;
        const float* bias = (which ? biases.k[rank] : biases.q[rank]) + column;
        const auto biased = [&](float (&x)[8], int i) {
          float more[8];
          unpack8<T>(x, raw[kTogether * which][i]);
          load(more, bias + kOn[i]);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[e] += more[e];
        };
        float x[2][8];
        biased(x[0], 0);
        if constexpr (Sh::MODEL == kMimo) biased(x[1], 1);
#pragma unroll
        for (int e = 0; e < kAngles; ++e) {
          float& a = Sh::MODEL == kMimo ? x[0][e] : x[0][2 * e];
          float& b = Sh::MODEL == kMimo ? x[1][e] : x[0][2 * e + 1];
          const float turned = a * cos[e] - b * sin[e];
          b = a * sin[e] + b * cos[e], a = turned;
        }
        put16(tile.unit(row, column), pack8<T>(x[0]));
        if constexpr (Sh::MODEL == kMimo) put16(tile.unit(row, column + kOn[1]), pack8<T>(x[1]));
#pragma unroll
        for (int i = Sh::MODEL == kMimo ? 2 : 1; i < kPieces; ++i) {
          biased(x[0], i);
          put16(tile.unit(row, column + kOn[i]), pack8<T>(x[0]));
        }
      }
    });
}

// A unit's parameters: psi, zeta and phi [R][P] (1 where they are missing) and D [P] (0).
template <class Sh>
struct Parameters {
  float psi[Sh::kRanks ? Sh::R : 1][P], zeta[Sh::kRanks ? Sh::R : 1][P], phi[Sh::kRanks ? Sh::R : 1][P], skip[P];
};

template <class Sh, int THREADS>
__device__ __forceinline__ void copy_parameters(
    Parameters<Sh>& to, const Arguments& a, int head, int first, int width) {
  if constexpr (Sh::kRanks)
    for (int i = threadIdx.x; i < Sh::R * P / 4; i += THREADS) {
      const int r = i / (P / 4), p = i % (P / 4) * 4;
      const long long from = (long long)(head * Sh::R + r) * a.P + first + p;
      copy16(&to.psi[r][p], at<const float>(a.psi) + from, p < width);
      copy16(&to.phi[r][p], at<const float>(a.phi) + from, p < width);
      if (a.z) copy16(&to.zeta[r][p], at<const float>(a.zeta) + from, p < width);
    }
  for (int p = threadIdx.x; p < P; p += THREADS) {
    if (a.D)
      copy4(&to.skip[p], at<const float>(a.D) + head * a.d_h + (first + p) * a.d_p, p < width);
    else
      to.skip[p] = 0.f;
  }
}

// The angles of a chunk: 128 threads, SEG of them an angle, LONG tokens each. An angle is kept in revolutions, of which
// a token adds tanh(angle) dt / 2: mod 2 pi is a floor, and exact.
template <class Sh, int FIRST = 0>  // the warpgroup that has them
struct Angles {
  static constexpr int LONG = Sh::kTurns ? Sh::LONG : 1, SEG = Sh::kTurns ? Sh::SEG : 1;
  float raw[LONG];

  __device__ static bool mine() { return Sh::kTurns && threadIdx.x / 128 == FIRST; }
  __device__ static int index() { return threadIdx.x % 128 / SEG; }
  __device__ static int token(int i) { return threadIdx.x % SEG * LONG + i; }

  // `angles` at the chunk's first token.
  __device__ void load(const float* angles, int per_token, int live) {
    if (!mine()) return;
#pragma unroll
    for (int i = 0; i < LONG; ++i) raw[i] = token(i) < live ? angles[token(i) * per_token + index()] : 0.f;
  }

  __device__ static float revolutions(float x) { return x - rintf(x); }  // whole ones cost sums their digits

  // Fills turns; gives the chunk's revolutions, and loses raw. `steps` at the chunk's first token.
  __device__ float turn(Turns<Sh>& turns, float base, const float* steps, int live) {
    if (!mine()) return 0.f;
    float(&sum)[LONG] = raw;  // its own place: where LONG is 16 registers are few
#pragma unroll
    for (int i = 0; i < LONG; ++i)
      sum[i] = (i ? sum[i - 1] : 0.f) + (token(i) < live ? revolutions(0.5f * tanhf(raw[i]) * steps[token(i)]) : 0.f);
    float up_to = sum[LONG - 1];
#pragma unroll
    for (int d = 1; d < SEG; d *= 2) {
      const float other = __shfl_up_sync(~0u, up_to, d, SEG);
      if (threadIdx.x % SEG >= d) up_to += other;
    }
    const float all = __shfl_sync(~0u, up_to, SEG - 1, SEG);
    float before = __shfl_up_sync(~0u, up_to, 1, SEG);  // not up_to - sum: no later token may reach an earlier one's digits
    before = threadIdx.x % SEG ? before + base : base;
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      const float x = before + sum[i], revolution = x - rintf(x);
      turns.cos[token(i)][index()] = __cosf(6.283185307179586f * revolution);
      turns.sin[token(i)][index()] = __sinf(6.283185307179586f * revolution);
    }
    return all;
  }
};

__device__ inline float fraction(float x) { return x - floorf(x); }

}  // namespace nam56r::ssd
