// A chunk in shared memory: rows of q or k, turned in place; the angles that turn them; x, z, dy and the decays.
//
// A chunk is CT = 16 TB tokens; its tiles have NB = R TB blocks of 16 rows, block r TB + tb: rank r's tokens 16 tb and on.
// So rank r of a token lies where rank 0 lies, one block further: sums over ranks stay in a thread, and the decays of a
// 16 x 16 block are the same for all R x R pairs of ranks.
#pragma once

#include "ssd/arguments.cuh"
#include "ssd/device.cuh"

namespace nam56r::ssd {

constexpr int kMamba2 = 0, kSiso = 1, kMimo = 2;

template <typename T_, int MODEL_, int R_, int P_, int N_>
struct Shape {
  using T = T_;
  static constexpr int MODEL = MODEL_, R = R_, P = P_, N = N_;
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
  float L[Sh::CT], w[Sh::CT], own[Sh::CT];  // L past the end is that of the last token
};

// Calls pairs and plain with the (row, column) of every 8 columns of q or k that this lane copies and turns: pairs for
// what is turned (MIMO: with its partner N / 2 further), plain for the rest. A warp has a block's 16 rows, a lane the
// same columns in all its rows.
template <class Sh, typename Pairs, typename Plain>
__device__ __forceinline__ void over_block(int block, Pairs pairs, Plain plain) {
  constexpr int N = Sh::N;
  constexpr int kPairs = Sh::MODEL == kMimo ? N / 32 : Sh::MODEL == kSiso ? N / 16 : 0;
  constexpr int kPlain = Sh::MODEL == kMamba2 ? N / 8 : N / 16;
  const int lane = threadIdx.x % 32;
  if constexpr (kPairs > 0) {
#pragma unroll
    for (int i = 0; i < (kPairs + 1) / 2; ++i)
      if (kPairs > 1 || lane < 16) pairs(block * 16 + lane / kPairs + i * (32 / kPairs), lane % kPairs * 8);
  }
  const int unit = lane % kPlain;
  const int column = Sh::MODEL == kMamba2 ? unit * 8
      : Sh::MODEL == kSiso ? N / 2 + unit * 8
      : unit < N / 32 ? N / 4 + unit * 8 : 3 * N / 4 + (unit - N / 32) * 8;
#pragma unroll
  for (int i = 0; i < kPlain / 2; ++i) plain(block * 16 + lane / kPlain + i * (32 / kPlain), column);
}

// Starts copying a chunk's rows of B or C; `from` is at its first token, `live` counts its tokens.
template <class Sh, int WARPS>
__device__ __forceinline__ void copy_rows(
    Tile<Sh::ROWS, Sh::N>& tile, const typename Sh::T* from, int per_token, int per_rank, int live) {
#pragma unroll
  for (int block = threadIdx.x / 32; block < Sh::NB; block += WARPS) {
    const typename Sh::T* first = from + block / Sh::TB * per_rank + block % Sh::TB * 16 * per_token;
    const auto copy = [&](int row, int column) {
      const int token = row - block * 16;
      copy16(&tile.x[row][column], first + token * per_token + column, token + block % Sh::TB * 16 < live);
    };
    over_block<Sh>(
        block,
        [&](int row, int column) {
          copy(row, column);
          if (Sh::MODEL == kMimo) copy(row, column + Sh::N / 2);
        },
        copy);
  }
}

template <class Sh, int THREADS>
__device__ __forceinline__ void copy_tokens(Tile<Sh::CT, Sh::P>& tile, const typename Sh::T* from, int per_token, int live) {
  constexpr int kUnits = Sh::CT * (Sh::P / 8);
#pragma unroll
  for (int n = 0; n < (kUnits + THREADS - 1) / THREADS; ++n) {
    const int i = threadIdx.x + n * THREADS, token = i / (Sh::P / 8), column = i % (Sh::P / 8) * 8;
    if (kUnits % THREADS == 0 || i < kUnits) copy16(&tile.x[token][column], from + token * per_token + column, token < live);
  }
}

template <class Sh>
__device__ __forceinline__ void copy_decays(Decays<Sh>& to, const Arguments& a, long long from, int live) {
  const int i = threadIdx.x;
  if (i < Sh::CT) {
    copy4(&to.L[i], at<const float>(a.L) + from + min(i, live - 1), true);
    copy4(&to.w[i], at<const float>(a.W) + from + i, i < live);
    if (Sh::MODEL != kMamba2) copy4(&to.own[i], at<const float>(a.OWN) + from + i, i < live);
  }
}

template <class Sh>
__device__ float own_weight(const Decays<Sh>& d, int t) { return Sh::MODEL == kMamba2 ? d.w[t] : d.own[t]; }

template <typename T>
__device__ void unpack8(float (&x)[8], const void* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  const unsigned u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = Pair<T>::unpack(u[i]);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}
template <typename T>
__device__ void pack8(void* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = {
      Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]), Pair<T>::pack(x[4], x[5]), Pair<T>::pack(x[6], x[7])};
}
__device__ inline void load8(float (&x)[8], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
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
template <class Sh, int WARPS>
__device__ __forceinline__ void turn_rows(
    Tile<Sh::ROWS, Sh::N>& q, Tile<Sh::ROWS, Sh::N>* k, const Biases<Sh>& biases, const Turns<Sh>& turns) {
  using T = typename Sh::T;
  if constexpr (Sh::kTurns) {
#pragma unroll
    for (int block = threadIdx.x / 32; block < Sh::NB; block += WARPS) {
      const int rank = block / Sh::TB;
      const auto biased = [&](float (&x)[8], const unsigned short* from, const float* bias) {
        float more[8];
        unpack8<T>(x, from);
        load8(more, bias);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] += more[i];
      };
      over_block<Sh>(
          block,
          [&](int row, int column) {
            const int token = row - rank * Sh::CT;
            constexpr int kAngles = Sh::MODEL == kMimo ? 8 : 4;
            float cos[kAngles], sin[kAngles];
            const int first = column * kAngles / 8;
#pragma unroll
            for (int i = 0; i < kAngles; i += 4) {
              const float4 c = *reinterpret_cast<const float4*>(&turns.cos[token][first + i]);
              const float4 s = *reinterpret_cast<const float4*>(&turns.sin[token][first + i]);
              cos[i] = c.x, cos[i + 1] = c.y, cos[i + 2] = c.z, cos[i + 3] = c.w;
              sin[i] = s.x, sin[i + 1] = s.y, sin[i + 2] = s.z, sin[i + 3] = s.w;
            }
            const auto turn = [&](Tile<Sh::ROWS, Sh::N>& tile, const float* bias) {
              float a[8];
              biased(a, &tile.x[row][column], bias + column);
              if constexpr (Sh::MODEL == kMimo) {
                float b[8];
                biased(b, &tile.x[row][column + Sh::N / 2], bias + column + Sh::N / 2);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                  const float turned = a[i] * cos[i] - b[i] * sin[i];
                  b[i] = a[i] * sin[i] + b[i] * cos[i], a[i] = turned;
                }
                pack8<T>(&tile.x[row][column + Sh::N / 2], b);
              } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float turned = a[2 * i] * cos[i] - a[2 * i + 1] * sin[i];
                  a[2 * i + 1] = a[2 * i] * sin[i] + a[2 * i + 1] * cos[i], a[2 * i] = turned;
                }
              }
              pack8<T>(&tile.x[row][column], a);
            };
            turn(q, biases.q[rank]);
            if (k) turn(*k, biases.k[rank]);
          },
          [&](int row, int column) {
            float x[8];
            biased(x, &q.x[row][column], &biases.q[rank][column]);
            pack8<T>(&q.x[row][column], x);
            if (!k) return;
            biased(x, &k->x[row][column], &biases.k[rank][column]);
            pack8<T>(&k->x[row][column], x);
          });
    }
  }
}

// The angles of a chunk: 128 threads, SEG of them an angle, LONG tokens each. An angle is kept in revolutions, of which
// a token adds tanh(angle) dt / 2: mod 2 pi is a floor, and exact.
template <class Sh>
struct Angles {
  static constexpr int LONG = Sh::kTurns ? Sh::LONG : 1, SEG = Sh::kTurns ? Sh::SEG : 1;
  float raw[LONG], dt[LONG];

  __device__ static bool mine() { return Sh::kTurns && threadIdx.x < 128; }
  __device__ static int index() { return threadIdx.x / SEG; }
  __device__ static int token(int i) { return threadIdx.x % SEG * LONG + i; }

  // `angles` and `dt` at the chunk's first token.
  __device__ void load(const float* angles, int per_token, const float* steps, int live) {
    if (!mine()) return;
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      const bool inside = token(i) < live;
      raw[i] = inside ? angles[token(i) * per_token + index()] : 0.f;
      dt[i] = inside ? steps[token(i)] : 0.f;
    }
  }
  __device__ static float tanh_(float x) { return 1.f - 2.f * reciprocal(1.f + exp_(2.f * x)); }

  // Fills turns; gives the chunk's revolutions.
  __device__ float turn(Turns<Sh>& turns, float base) const {
    if (!mine()) return 0.f;
    float sum[LONG];
#pragma unroll
    for (int i = 0; i < LONG; ++i) sum[i] = (i ? sum[i - 1] : 0.f) + 0.5f * tanh_(raw[i]) * dt[i];
    float before = sum[LONG - 1];
#pragma unroll
    for (int d = 1; d < SEG; d *= 2) {
      const float other = __shfl_up_sync(~0u, before, d, SEG);
      if (threadIdx.x % SEG >= d) before += other;
    }
    const float all = __shfl_sync(~0u, before, SEG - 1, SEG);
    before += base - sum[LONG - 1];
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
