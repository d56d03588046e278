// A chunk in shared memory: rows of q or k, turned in place; the angles that turn them; x, z, dy and the decays.
//
// A chunk is CT = 64 / R tokens, its tiles have 64 rows: row r CT + t is rank r of token t. So eight rows on from one that
// is a multiple of 8 have one rank and eight tokens, and the decays are the same for all R x R pairs of ranks.
#pragma once

#include "ssd/arguments.cuh"
#include "ssd/device.cuh"
#include "hopper/wgmma.cuh"

namespace nam56r::ssd {

constexpr int kMamba2 = 0, kSiso = 1, kMimo = 2;

constexpr int P = 64;  // columns of a unit; a head of 32 leaves the rest zero
constexpr int ROWS = 64;
constexpr float PI = 3.141592653589793f;

template <typename T_, int MODEL_, int R_, int N_>
struct Shape {
  using T = T_;
  static constexpr int MODEL = MODEL_, R = R_, N = N_;
  static constexpr int CT = ROWS / R, EIGHTS = CT / 8, NA = N / 4;
  static constexpr int TB = CT < 16 ? 1 : CT / 16;  // blocks of 16 tokens; one of 8 is read twice
  static constexpr bool kTurns = MODEL != kMamba2, kRanks = MODEL == kMimo;
  static constexpr int SEG = 128 / NA < CT ? 128 / NA : CT, LONG = CT / SEG;  // threads that share an angle, and tokens each takes

  // Of the eight rows (or columns of scores) from 8 i on: their rank, and the first's token.
  __device__ static constexpr int rank(int i) { return i * 8 / CT; }
  __device__ static constexpr int token(int i) { return i * 8 % CT; }
};

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

template <class Sh>
struct alignas(16) Turns {  // of a chunk: cos and sin in a register's halves; rows padded: neighbours lie in different banks
  static constexpr int kPad = Sh::CT * Sh::N > 8192 ? 0 : 4;  // there is no room where both are large
  unsigned x[Sh::kTurns ? Sh::CT : 1][Sh::NA + kPad];

  // Where an angle lies. Of every second eight the halves are exchanged: four tokens apart by two, of two eights, then
  // lie in different banks.
  __device__ static constexpr int at(int angle) { return angle ^ (angle >> 3 & 1) << 2; }

  __device__ static unsigned pack(float cos, float sin) { return Pair<Float16>::pack(cos, sin); }
  __device__ static float2 unpack(unsigned turn) { return Pair<Float16>::unpack(turn); }
};

template <class Sh, int KINDS = Sh::MODEL == kMamba2 ? 2 : 4>  // of L, w, own, dt the first; Mamba-2's own is w
struct Decays {
  float x[KINDS][Sh::CT];

  __device__ auto& L() const { return x[0]; }  // past the end that of the last token
  __device__ auto& w() const { return x[1]; }
  __device__ auto& own() const { return x[2]; }
  __device__ auto& dt() const { return x[3]; }
};

// What one of 128 threads turns of a chunk's rows, of q or of k or of both (TILES): always the same columns of one rank, so
// that it can keep their biases, of ITEMS tokens. Its columns are 8 from each of PIECES; what is turned is the first piece,
// for MIMO with the second. The eight lanes that access shared memory at a time have units in different banks.
template <class Sh, int TILES>
struct Rows {
  using T = typename Sh::T;
  static constexpr int N = Sh::N, PIECES = Sh::MODEL == kMimo ? 4 : 2, STRIPS = N / 8 / PIECES, TURNED = PIECES / 2;
  static constexpr int kAll = 128 / (STRIPS * Sh::R * TILES), LANES = kAll < Sh::CT ? kAll : Sh::CT, ITEMS = Sh::CT / LANES;
  static constexpr int kApart = LANES < 8 ? 8 / LANES : 1;
  static_assert(kAll >= 1);
  int tile, rank, column, first;  // which of the tiles; the first item's token

  __device__ Rows() {
    const int i = threadIdx.x % 128, rest = i / kAll;
    tile = rest / (STRIPS * Sh::R), rank = rest / STRIPS % Sh::R, column = rest % STRIPS * 8, first = i % kAll * kApart;
  }
  __device__ bool mine() const { return kAll == LANES || first < Sh::CT; }
  __device__ static constexpr int later(int item) {  // the item's token, after the first's
    return LANES < 8 ? item % kApart + item / kApart * 8 : item * LANES;
  }
  __device__ static constexpr int on(int piece) { return piece == 0 ? 0 : piece == 1 ? N / 2 : piece == 2 ? N / 4 : 3 * N / 4; }

  using Bias = uint4[PIECES];  // rounded: it is added to pairs of elements
  struct Coming {  // from memory
    float x[PIECES][8];

    __device__ void load(const Rows& row, const float* of_head) {  // [R][N]
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) nam56r::ssd::load(x[piece], of_head + row.rank * N + row.column + on(piece));
    }
    __device__ void round(Bias& bias) {
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
        for (int e = 0; e < 8; ++e) asm volatile("" : "+f"(x[piece][e]));  // not before what comes before
        bias[piece] = pack8<T>(x[piece]);
      }
    }
  };
  __device__ void load(Bias& bias, const float* of_head) const {
    Coming x;
    x.load(*this, of_head), x.round(bias);
  }

  static constexpr bool kDistant = Sh::MODEL == kMimo;  // pairs N / 2 apart, or adjacent
  static constexpr int kAngles = kDistant ? 8 : 4;
  struct Item {
    uint4 by[kAngles / 4], x[PIECES];
  };
  __device__ __forceinline__ void get(Item& to, int i, const Tile<ROWS, N>& from, const Turns<Sh>& turns) const {
    const int token = first + later(i), row = rank * Sh::CT + token;
#pragma unroll
    for (int n = 0; n < kAngles / 4; ++n) to.by[n] = get16(&turns.x[token][Turns<Sh>::at(column * kAngles / 8 + n * 4)]);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) to.x[piece] = get16(from.unit(row, column + on(piece)));
  }
  __device__ __forceinline__ void put(Item& item, int i, Tile<ROWS, N>& to, const Bias& bias) const {
    const int row = rank * Sh::CT + first + later(i);
    float2 by[kAngles];
#pragma unroll
    for (int n = 0; n < kAngles; n += 4) {
      const uint4 four = item.by[n / 4];
      by[n] = Turns<Sh>::unpack(four.x), by[n + 1] = Turns<Sh>::unpack(four.y);
      by[n + 2] = Turns<Sh>::unpack(four.z), by[n + 3] = Turns<Sh>::unpack(four.w);
    }
    uint4(&x)[PIECES] = item.x;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const uint4 b = bias[piece], raw = x[piece];
      x[piece] = {Pair<T>::add(raw.x, b.x), Pair<T>::add(raw.y, b.y), Pair<T>::add(raw.z, b.z), Pair<T>::add(raw.w, b.w)};
    }
    float u[TURNED][8];
#pragma unroll
    for (int piece = 0; piece < TURNED; ++piece) unpack8<T>(u[piece], x[piece]);
#pragma unroll
    for (int e = 0; e < kAngles; ++e) {
      float& a = kDistant ? u[0][e] : u[0][2 * e % 8];
      float& b = kDistant ? u[TURNED - 1][e] : u[0][(2 * e + 1) % 8];
      const float turned = a * by[e].x - b * by[e].y;
      b = a * by[e].y + b * by[e].x, a = turned;
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
      put16(to.unit(row, column + on(piece)), piece < TURNED ? pack8<T>(u[piece % TURNED]) : x[piece]);
  }

  // Adds the biases and turns, from one tile to another or in place: kAtOnce items without a branch, with kAhead each loaded
  // before the one before it is stored, which takes 24 registers.
  template <int kAtOnce, bool kAhead = false>
  __device__ __forceinline__ void turn(Tile<ROWS, N>& to, const Tile<ROWS, N>& from, const Bias& bias, const Turns<Sh>& turns) const {
    if (!Sh::kTurns || !mine()) return;
    Item item[2];
    if (kAhead) get(item[0], 0, from, turns);
#pragma unroll kAtOnce
    for (int i = 0; i < ITEMS; ++i) {
      if (!kAhead) get(item[0], i, from, turns);
      else if (i + 1 < ITEMS) get(item[(i + 1) % 2], i + 1, from, turns);
      put(item[kAhead ? i % 2 : 0], i, to, bias);
    }
  }
};

// Starts fetching a chunk's rows of B or C by TMA, from a token on; one thread does.
template <class Sh>
__device__ __forceinline__ void fetch_rows(
    Arrival& arrived, Tile<ROWS, Sh::N>& to, const TensorMap& map, int group, int token, int batch) {
  arrived.expect(sizeof(to));
#pragma unroll
  for (int part = 0; part < to.kParts; ++part) arrived.copy_box(&to.x[part], &map, part * 64, group, token, batch);
}

// Copies by 128 threads, neighbours to neighbours: a line of memory that comes for lanes apart is written once for each.

// Starts copying a chunk's rows of B or C; `from` is at its first token and the group, `live` counts its tokens.
template <class Sh>
__device__ __forceinline__ void copy_rows(
    Tile<ROWS, Sh::N>& to, const typename Sh::T* from, int per_token, int per_rank, int live) {
  constexpr int kUnits = Sh::N / 8, kPass = 128 / kUnits;  // units of a row, rows at once
  const int column = threadIdx.x % kUnits * 8, first = threadIdx.x % 128 / kUnits;
  if constexpr (kPass <= Sh::CT) {  // all of a pass are of one rank
    const typename Sh::T* from_first = from + first * per_token + column;
    unsigned short* to_first = kPass % 8 ? nullptr : to.unit(first, column);
#pragma unroll
    for (int n = 0; n < ROWS / kPass; ++n) {
      const int later = n * kPass % Sh::CT, on = n * kPass / Sh::CT * per_rank + later * per_token;
      copy16(kPass % 8 ? to.unit(n * kPass + first, column) : to_first + n * kPass * 64, from_first + on, first + later < live);
    }
  } else {
#pragma unroll
    for (int n = 0; n < ROWS / kPass; ++n) {
      const int row = n * kPass + first, token = row % Sh::CT;
      copy16(to.unit(row, column), from + row / Sh::CT * per_rank + token * per_token + column, token < live);
    }
  }
}

// The same of x, z or dy.
template <class Sh>
__device__ __forceinline__ void copy_tokens(
    Tile<Sh::CT, P>& tile, const typename Sh::T* from, int per_token, int live, int width) {
  constexpr int kUnits = Sh::CT * (P / 8);
#pragma unroll
  for (int n = 0; n < (kUnits + 127) / 128; ++n) {
    const int i = threadIdx.x % 128 + n * 128, token = i / (P / 8), column = i % (P / 8) * 8;
    if (kUnits % 128 == 0 || i < kUnits)
      copy16(tile.unit(token, column), from + token * per_token + column, token < live && column < width);
  }
}

template <class Sh>
__device__ __forceinline__ void copy_turns(Turns<Sh>& to, const Turns<Sh>* from) {
  constexpr int kUnits = sizeof(to) / 16;
#pragma unroll
  for (int n = 0; n < (kUnits + 127) / 128; ++n)
    if (const int i = threadIdx.x % 128 + n * 128; kUnits % 128 == 0 || i < kUnits)
      copy16(&to.x[0][0] + i * 4, &from->x[0][0] + i * 4, true);
}

// `from` is L at the chunk's first token; w, own and dt lie behind it, `apart` of each other.
template <class Sh, int KINDS>
__device__ __forceinline__ void copy_decays(Decays<Sh, KINDS>& to, const float* from, int apart, int live) {
  constexpr int kAll = KINDS * Sh::CT;
#pragma unroll
  for (int n = 0; n < (kAll + 127) / 128; ++n) {
    const int i = (threadIdx.x ^ 64) % 128 + n * 128, which = i / Sh::CT, t = i % Sh::CT;  // not first the warps that fetch more
    if (kAll % 128 == 0 || i < kAll) copy4(&to.x[which][t], from + which * apart + min(t, live - 1), which == 0 || t < live);
  }
}

template <class Sh>
__device__ float own_weight(const Decays<Sh>& d, int t) { return Sh::MODEL == kMamba2 ? d.w()[t] : d.own()[t]; }

// A unit's parameters: psi, zeta and phi [R][P] (1 where they are missing) and D [P] (0).
template <class Sh>
struct Parameters {
  float psi[Sh::R][P], zeta[Sh::R][P], phi[Sh::R][P], skip[P];
};

template <class Sh, int THREADS>
__device__ __forceinline__ void copy_parameters(
    Parameters<Sh>& to, const Arguments& a, int head, int first, int width) {
  if constexpr (Sh::kRanks)
    for (int i = threadIdx.x % THREADS; i < Sh::R * P / 4; i += THREADS) {
      const int r = i / (P / 4), p = i % (P / 4) * 4;
      const long long from = (long long)(head * Sh::R + r) * a.P + first + p;
      copy16(&to.psi[r][p], at<const float>(a.psi) + from, p < width);
      copy16(&to.phi[r][p], at<const float>(a.phi) + from, p < width);
      copy16(&to.zeta[r][p], at<const float>(a.zeta) + from, a.z && p < width);
    }
  for (int p = threadIdx.x % THREADS; p < P; p += THREADS)
    copy4(&to.skip[p], a.D ? at<const float>(a.D) + head * a.d_h + (first + p) * a.d_p : at<const float>(a.L), a.D && p < width);
}

// A box that TMA fetches holds what is past the sequence's end too. Zeroes rows of q or k, of tokens from `live` on.
template <class Sh>
__device__ __forceinline__ void clear_rows(Tile<ROWS, Sh::N>& tile, int live) {
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < ROWS * Sh::N / 8; i += 128)
    if (const int row = i / (Sh::N / 8); row % Sh::CT >= live) put16(tile.unit(row, i % (Sh::N / 8) * 8), uint4{});
}

// The same of a warp's 16 columns of x and z, from p0 on.
template <class Sh>
__device__ __forceinline__ void clear_columns(Tile<Sh::CT, P>& x, Tile<Sh::CT, P>& z, int p0, int live) {
#pragma unroll 1
  for (int i = live * 2 + threadIdx.x % 32; i < Sh::CT * 2; i += 32)
    put16(x.unit(i / 2, p0 + i % 2 * 8), uint4{}), put16(z.unit(i / 2, p0 + i % 2 * 8), uint4{});
  __syncwarp();
}

// The angles of a chunk: 128 threads, SEG of them an angle, LONG tokens each. An angle is kept in revolutions, of which
// a token adds tanh(angle) dt / 2: mod 2 pi is a floor, and exact.
template <class Sh>
struct Angles {
  static constexpr int LONG = Sh::kTurns ? Sh::LONG : 1, SEG = Sh::kTurns ? Sh::SEG : 1;
  float bend[LONG], step[LONG];  // tanh(angle), dt

  __device__ static bool mine() { return Sh::kTurns && (Sh::NA * SEG == 128 || int(threadIdx.x) % 128 < Sh::NA * SEG); }
  __device__ static int index() { return threadIdx.x % 128 / SEG; }
  __device__ static int token(int i) { return threadIdx.x % SEG * LONG + i; }

  // `angles` and `steps` at the chunk's first token.
  __device__ void load(const float* angles, int per_token, const float* steps, int live) {
    if (!mine()) return;
    angles += token(0) * per_token + index(), steps += token(0), live -= token(0);
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      bend[i] = i < live ? __ldg(angles) : 0.f, step[i] = i < live ? __ldg(steps + i) : 0.f;
      angles += per_token;
    }
  }

  // The revolutions of a token; whole ones, which cost sums their digits, are dropped. Rounded the same wherever it is called.
  __device__ static float turned(float bend, float step) {
    const float x = __fmul_rn(0.5f * bend, step);
    return x - rintf(x);
  }
  __device__ static unsigned turn_of(float revolutions) {
    const float angle = 6.283185307179586f * (revolutions - rintf(revolutions));
    return Turns<Sh>::pack(__cosf(angle), __sinf(angle));
  }

  // Fills turns; gives the chunk's revolutions, and loses what was loaded.
  __device__ float turn(Turns<Sh>& turns, float base) {
    if (!mine()) return 0.f;
    float(&sum)[LONG] = bend;
#pragma unroll
    for (int i = 0; i < LONG; ++i) {
      const float more = turned(bend[i], step[i]);
      sum[i] = i ? sum[i - 1] + more : more;
    }
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
    for (int i = 0; i < LONG; ++i) turns.x[token(i)][Turns<Sh>::at(index())] = turn_of(before + sum[i]);
    return all;
  }
};

// A warp's 16 columns of a tile, from p0 on, to memory.
template <class Sh>
__device__ __forceinline__ void store_columns(
    typename Sh::T* to, int per_token, const Tile<Sh::CT, P>& tile, int p0, int live, int width) {
  const int lane = threadIdx.x % 32, c = p0 + lane % 2 * 8;
  __syncwarp();
#pragma unroll
  for (int tb = 0; tb < Sh::TB; ++tb) {
    const int t = tb * 16 + lane / 2;
    if (t < Sh::CT && t < live && c < width) put16(to + t * per_token + c, get16(tile.unit(t, c)));
  }
}

// A thread's part of a state [P, N], the rows p[0] and p[1] as far as there are `width`: calls f(x, y, on) for its pairs, of which
// the first lies at 0 in memory, where a row has N = 8 eights.
template <int eights, typename State, typename F>
__device__ __forceinline__ void each_pair(State (&S)[eights][4], const int (&p)[2], int width, F f) {
#pragma unroll
  for (int j = 0; j < eights; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (p[e] < width) f(S[j][2 * e], S[j][2 * e + 1], 8 * e * (8 * eights) + 8 * j);
}
template <int eights>
__device__ __forceinline__ void load_state(float (&S)[eights][4], const float* from, const int (&p)[2], int width) {
  each_pair(S, p, width, [&](float& x, float& y, int on) {
    const float2 v = *reinterpret_cast<const float2*>(from + on);
    x = v.x, y = v.y;
  });
}
template <int eights>
__device__ __forceinline__ void store_state(float* to, const float (&S)[eights][4], const int (&p)[2], int width) {
  each_pair(S, p, width, [&](float x, float y, int on) { *reinterpret_cast<float2*>(to + on) = {x, y}; });
}
template <int eights>  // the sum of its products with another's
__device__ __forceinline__ float dot_state(const float (&S)[eights][4], const float* other, const int (&p)[2], int width) {
  float sum = 0.f;
  each_pair(S, p, width, [&](float x, float y, int on) {
    const float2 v = *reinterpret_cast<const float2*>(other + on);
    sum += x * v.x + y * v.y;
  });
  return sum;
}

__device__ inline float fraction(float x) { return x - floorf(x); }

}  // namespace nam56r::ssd
