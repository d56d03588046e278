// The gradients of what a token writes: B (through k), x, D, and MIMO's psi.
//
//   scores^T = k q^T, dm^T = v dy^T
//   dv = (scores * mix)^T dy + e^(L_end - L) w (k G^T) + D dy     dk = (dm * mix)^T q + e^(L_end - L) w (v G)
// As in query.cuh, a warp takes 16 rows, here of keys, and walks the chunks backward; G is `carried`, which it overwrites.
// Registers: the gradient of B [16, N], both products with mix [16, ROWS] rounded, v [16, P] rounded, dv [16, P].
#pragma once

#include "ssd/gradients.cuh"

namespace nam56r::ssd {

template <class Sh>
struct KeyShared {
  static constexpr bool kRanks = Sh::kRanks;
  Tile<Sh::ROWS, Sh::N> q, k;
  Tile<Sh::P, Sh::N> G;
  Tile<Sh::ROWS, Sh::P> gated;  // dy of every rank
  Tile<Sh::CT, Sh::P> x;
  Tile<kRanks ? Sh::CT : 8, Sh::P> dy;  // without ranks it is gated in place
  Tile<Sh::CT, Sh::P> z;
  Decays<Sh> decays;
  Turns<Sh> turns;
  Biases<Sh> biases;
  float turned[Sh::ROWS][Sh::NA + 4];
  float dx[kRanks ? Sh::ROWS : 1][Sh::P + 4];
  float bias[Sh::NB][Sh::N], psi[kRanks ? Sh::NB : 1][Sh::P], skip[Sh::NB][Sh::P];
  float dw[Sh::ROWS], by_token[4][Sh::CT];
};

template <typename T, int MODEL, int R, int P, int N>
__global__ void __launch_bounds__(32 * Shape<T, MODEL, R, P, N>::NB, R == 8 ? 1 : 2) key(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, P, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, THREADS = 32 * NB;
  extern __shared__ char bytes[];
  auto& s = *reinterpret_cast<KeyShared<Sh>*>(bytes);

  const int lane = threadIdx.x % 32, b = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
  const int rank = b / TB, tb = b % TB;
  const Place at_ = place(a, CT);
  if (at_.chunks <= 0) return;
  const Sequence& seq = at_.seq;
  const int g = at_.group, all_p = P * at_.blocks, H = int(a.H), U = H * at_.blocks;
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + g * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
  const int units = int(a.units);
  Angles<Sh> angle;

  for (int j = at_.chunks - 1; j >= 0; --j) {
    const bool set = j == at_.chunks - 1;
    const int start = (at_.chunk + j) * CT, live = seq.length - start;
    const long long token = seq.token + start, in_row = seq.first + start;
    float dB[N / 8][4] = {};
    float dangle[Angles<Sh>::LONG] = {};
    for (int i = 0; i < units; ++i) {
      const int unit = (g * int(a.heads_per_group) * at_.blocks) + at_.split * units + i;
      const int h = unit / at_.blocks, p_first = unit % at_.blocks * P;
      const long long per_rank = ((long long)h * R + rank) * all_p + p_first;
      T* carried = at<T>(a.carried) + ((at_.span * H + h) * all_p + p_first) * N;

      __syncthreads();  // the head before is done with shared memory
      copy_rows<Sh, NB>(s.q, C + start * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh, NB>(s.k, B + start * a.B_s, int(a.B_s), int(a.B_r), live);
      copy_biases<Sh, THREADS>(s.biases, a, h);
      auto& raw = [&]() -> auto& { if constexpr (Sh::kRanks) return s.dy; else return s.gated; }();
      copy_tokens<Sh, THREADS>(s.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live);
      copy_tokens<Sh, THREADS>(raw, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live);
      if (a.z)
        copy_tokens<Sh, THREADS>(s.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live);
      copy_decays<Sh>(s.decays, a, h * a.tokens + token, live);
#pragma unroll 2
      for (int c = threadIdx.x; c < P * (N / 8); c += THREADS)
        copy16(&s.G.x[c / (N / 8)][c % (N / 8) * 8], carried + c * 8, true);
      commit();
      if (Angles<Sh>::mine()) {
        const float base = at<const float>(a.bases)[((at_.span * a.every + j) * H + h) * NA + Angles<Sh>::index()];
        angle.load(
            at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s),
            at<const float>(a.DT) + h * a.tokens + token, live);
        angle.turn(s.turns, base);
      }
      wait_copies();
      __syncthreads();
      turn_rows<Sh, NB>(s.q, &s.k, s.biases, s.turns);
      if (Sh::kRanks || a.z)
        for (int c = lane; c < 16 * (P / 8); c += 32) {
          const int t = tb * 16 + c / (P / 8), p = c % (P / 8) * 8;
          float d[8], more[8];
          unpack8<T>(d, &raw.x[t][p]);
          if constexpr (Sh::kRanks) {
            load8(more, at<const float>(a.phi) + per_rank + p);
#pragma unroll
            for (int e = 0; e < 8; ++e) d[e] *= more[e];
          }
          if (a.z) {
            float gate[8];
            unpack8<T>(gate, &s.z.x[t][p]);
            if constexpr (Sh::kRanks) load8(more, at<const float>(a.zeta) + per_rank + p);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              if constexpr (Sh::kRanks) gate[e] *= more[e];
              d[e] *= gate[e] * sigmoid(gate[e]);
            }
          }
          pack8<T>(&s.gated.x[b * 16 + c / (P / 8)][p], d);
        }
      // v of the warp's rows, as an A operand
      const auto psi_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(at<const float>(a.psi) + per_rank + p) : float2{1.f, 1.f}; };
      unsigned v[P / 16][4];
#pragma unroll
      for (int m = 0; m < P / 8; ++m) {
        const int p = m * 8 + col;
        const float2 psi = psi_at(p);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned x = s.x.pair(tb * 16 + row + 8 * e, p);
          const float2 f = Two::unpack(x);
          v[m / 2][m % 2 * 2 + e] = Sh::kRanks ? Two::pack(f.x * psi.x, f.y * psi.y) : x;
        }
      }
      __syncthreads();

      unsigned M[NB][4], dS[NB][4];
      float later[2] = {};  // w's gradient
      const float l[2] = {s.decays.L[tb * 16 + row], s.decays.L[tb * 16 + row + 8]};
      const float w[2] = {s.decays.w[tb * 16 + row], s.decays.w[tb * 16 + row + 8]};
      const float own[2] = {own_weight(s.decays, tb * 16 + row), own_weight(s.decays, tb * 16 + row + 8)};
      unsigned k[N / 16][4];
#pragma unroll
      for (int n = 0; n < N / 16; ++n) s.k.a(k[n], b * 16, n * 16);
#pragma unroll
      for (int tc = 0; tc < TB; ++tc) {
        if (tc < tb) continue;
        float decay[2][4];  // of what a key wrote, when the query reads it; 0 for earlier queries and its own token
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = n * 8 + col + e % 2, d = c + (tc - tb) * 16 - row - e / 2 * 8;
            const float since = exp_(s.decays.L[tc * 16 + c] - l[e / 2]);
            decay[n][e] = d > 0 ? since : 0.f;
          }
float m[R][2][4] = {}, dm[R][2][4] = {};
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned qt[4];
            s.q.b(qt, (r * TB + tc) * 16, n * 16);
            Two::mma(m[r][0], k[n], qt[0], qt[1]);
            Two::mma(m[r][1], k[n], qt[2], qt[3]);
          }
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned dt[4];
            s.gated.b(dt, (r * TB + tc) * 16, p * 16);
            Two::mma(dm[r][0], v[p], dt[0], dt[1]);
            Two::mma(dm[r][1], v[p], dt[2], dt[3]);
          }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int c = r * TB + tc;
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool same = row + e / 2 * 8 == n * 8 + col + e % 2 + (tc - tb) * 16;
              later[e / 2] += m[r][n][e] * dm[r][n][e] * decay[n][e];
              const float mix = same ? own[e / 2] : decay[n][e] * w[e / 2];
              m[r][n][e] *= mix, dm[r][n][e] *= mix;
            }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            M[c][e] = Two::pack(m[r][e / 2][e % 2 * 2], m[r][e / 2][e % 2 * 2 + 1]);
            dS[c][e] = Two::pack(dm[r][e / 2][e % 2 * 2], dm[r][e / 2][e % 2 * 2 + 1]);
          }
        }
      }

      const float end = s.decays.L[CT - 1], left[2] = {exp_(end - l[0]), exp_(end - l[1])};
      {
        float dv[P / 8][4] = {};
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
          for (int p = 0; p < P / 16; ++p) {
            unsigned gt[4];
            s.G.b(gt, p * 16, n * 16);
            Two::mma(dv[2 * p], k[n], gt[0], gt[1]);
            Two::mma(dv[2 * p + 1], k[n], gt[2], gt[3]);
          }
#pragma unroll
        for (int m = 0; m < P / 8; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 f = Two::unpack(v[m / 2][m % 2 * 2 + e]);
            dv[m][2 * e] *= left[e], dv[m][2 * e + 1] *= left[e];
            later[e] += f.x * dv[m][2 * e] + f.y * dv[m][2 * e + 1];
            dv[m][2 * e] *= w[e], dv[m][2 * e + 1] *= w[e];
          }
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          if (tc < tb) continue;
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int p = 0; p < P / 16; ++p) {
              unsigned dt[4];
              s.gated.b_t(dt, (r * TB + tc) * 16, p * 16);
              Two::mma(dv[2 * p], M[r * TB + tc], dt[0], dt[1]);
              Two::mma(dv[2 * p + 1], M[r * TB + tc], dt[2], dt[3]);
            }
        }
#pragma unroll
        for (int four = 0; four < P / 32; ++four) {
          float dpsi[8] = {}, dskip[8] = {};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int p = (four * 4 + m) * 8 + col;
            const float2 psi = psi_at(p);
            float2 skip = {0.f, 0.f};
            if (a.D) {
              const float* D = at<const float>(a.D) + h * a.d_h;
              skip = {D[(p_first + p) * a.d_p], D[(p_first + p + 1) * a.d_p]};
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int t = tb * 16 + row + 8 * e;
              const float2 d = Two::unpack(s.gated.pair(b * 16 + row + 8 * e, p)), x = Two::unpack(s.x.pair(t, p));
              const float(&from)[4] = dv[four * 4 + m];
              const float2 sum = {from[2 * e] + skip.x * d.x, from[2 * e + 1] + skip.y * d.y};
              dskip[2 * m] += d.x * x.x * psi.x, dskip[2 * m + 1] += d.y * x.y * psi.y;
              if constexpr (Sh::kRanks) {
                dpsi[2 * m] += sum.x * x.x, dpsi[2 * m + 1] += sum.y * x.y;
                *reinterpret_cast<float2*>(&s.dx[b * 16 + row + 8 * e][p]) = {sum.x * psi.x, sum.y * psi.y};
              } else if (t < live) {
                T* to = at<T>(a.dx) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p;
                *reinterpret_cast<unsigned*>(to) = Two::pack(sum.x, sum.y);
              }
            }
          }
          const int p = (four * 4 + folded() / 2) * 8 + col + folded() % 2;
          if constexpr (Sh::kRanks) {
            const float sum = fold(dpsi);
            s.psi[b][p] = sum;
          }
          if (a.dD) {
            const float sum = fold(dskip);
            s.skip[b][p] = sum;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = over_quad(later[e]);
        if (lane % 4 == 0) s.dw[b * 16 + row + 8 * e] = sum;
      }

      // dk, 32 columns at a time
#pragma unroll
      for (int group = 0; group < N / 32; ++group) {
        float acc[4][4] = {};
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            unsigned gt[4];
            s.G.b_t(gt, p * 16, column_of<Sh>(group, 2 * half));
            Two::mma(acc[2 * half], v[p], gt[0], gt[1]);
            Two::mma(acc[2 * half + 1], v[p], gt[2], gt[3]);
          }
#pragma unroll
        for (int e = 0; e < 16; ++e) acc[e / 4][e % 4] *= left[e % 4 / 2] * w[e % 4 / 2];
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          if (tc < tb) continue;
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              unsigned qt[4];
              s.q.b_t(qt, (r * TB + tc) * 16, column_of<Sh>(group, 2 * half));
              Two::mma(acc[2 * half], dS[r * TB + tc], qt[0], qt[1]);
              Two::mma(acc[2 * half + 1], dS[r * TB + tc], qt[2], qt[3]);
            }
        }
        turn_back<Sh>(acc, group, b, s.k, s.turns, s.turned);
        float sums[8];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int c = column_of<Sh>(group, n);
#pragma unroll
          for (int e = 0; e < 4; ++e) dB[c / 8][e] += acc[n][e];
          sums[2 * n] = acc[n][0] + acc[n][2], sums[2 * n + 1] = acc[n][1] + acc[n][3];
        }
        if constexpr (Sh::kTurns) {
          const float sum = fold(sums);
          s.bias[b][column_of<Sh>(group, folded() / 2) + col + folded() % 2] = sum;
        }
      }

      // G for the chunk before; a warp takes 16 of its rows, and some of its columns
      if (j) {
        constexpr int SLICES = P / 16, PARTS = NB / SLICES, WIDTH = N / PARTS;
        const int p0 = b % SLICES * 16, n0 = b / SLICES * WIDTH;
        const float decay = exp_(end);
        unsigned grown[NB][4];
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          float grow[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) grow[e] = exp_(s.decays.L[tc * 16 + col + e % 2 + e / 2 * 8]);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned dt[4];
            s.gated.a_t(dt, (r * TB + tc) * 16, p0);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float2 f = Two::unpack(dt[e]);
              grown[r * TB + tc][e] = Two::pack(f.x * grow[e / 2 * 2], f.y * grow[e / 2 * 2 + 1]);
            }
          }
        }
        T* to = carried + (p0 + row) * N + col;
#pragma unroll
        for (int n = 0; n < WIDTH; n += 16) {
          float acc[2][4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 f = Two::unpack(s.G.pair(p0 + row + e % 2 * 8, n0 + n + e / 2 * 8 + col));
            acc[e / 2][e % 2 * 2] = f.x * decay, acc[e / 2][e % 2 * 2 + 1] = f.y * decay;
          }
#pragma unroll
          for (int c = 0; c < NB; ++c) {
            unsigned qt[4];
            s.q.b_t(qt, c * 16, n0 + n);
            Two::mma(acc[0], grown[c], qt[0], qt[1]);
            Two::mma(acc[1], grown[c], qt[2], qt[3]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e)
            *reinterpret_cast<unsigned*>(to + e % 2 * 8 * N + n0 + n + e / 2 * 8) =
                Two::pack(acc[e / 2][e % 2 * 2], acc[e / 2][e % 2 * 2 + 1]);
        }
      }
      __syncthreads();

      // sums over ranks, tokens and angles
      if constexpr (Sh::kRanks) {
        for (int c = threadIdx.x; c < CT * (P / 2); c += THREADS) {
          const int t = c / (P / 2), p = c % (P / 2) * 2;
          float2 sum = {0.f, 0.f};
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float2 d = *reinterpret_cast<const float2*>(&s.dx[r * CT + t][p]);
            sum.x += d.x, sum.y += d.y;
          }
          if (t < live)
            *reinterpret_cast<unsigned*>(at<T>(a.dx) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p) =
                Two::pack(sum.x, sum.y);
        }
        for (int c = threadIdx.x; c < R * P; c += THREADS) {
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < TB; ++e) sum += s.psi[c / P * TB + e][c % P];
          add(at<float>(a.dpsi) + ((at_.span * H + h) * R + c / P) * all_p + p_first + c % P, sum, set);
        }
      }
      if (a.dD)
        for (int c = threadIdx.x; c < P; c += THREADS) {
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < NB; ++e) sum += s.skip[e][c];
          add(at<float>(a.dD) + (at_.span * H + h) * all_p + p_first + c, sum, set);
        }
      if constexpr (Sh::kTurns) {
        for (int c = threadIdx.x; c < R * N; c += THREADS) {
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < TB; ++e) sum += s.bias[c / N * TB + e][c % N];
          add(at<float>(a.dB_bias) + (at_.span * U + unit) * R * N + c, sum, set);
        }
        angle_gradients<Sh>(
            angle, s.turned, dangle, at<float>(a.total_k) + ((at_.span * a.every + j) * U + unit) * NA,
            a.angle_heads > 1 ? at<float>(a.dangle_k) + (unit * a.tokens + token) * NA : nullptr, s.by_token, live);
      }
      if (threadIdx.x < CT && threadIdx.x < live) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < R; ++r) sum += s.dw[r * CT + threadIdx.x];
        at<float>(a.DW)[unit * a.tokens + token + threadIdx.x] = sum;
      }
      if constexpr (Sh::kTurns) {
        __syncthreads();
        if (threadIdx.x < CT && threadIdx.x < live) {
          const float(&by)[4][CT] = s.by_token;
          const int t = threadIdx.x;
          at<float>(a.ddt_k)[unit * a.tokens + token + t] = 3.141592653589793f * (by[0][t] + by[1][t] + by[2][t] + by[3][t]);
        }
      }
    }
    store_rows<Sh>(
        dB,
        at<char>(a.dB) + (a.splits > 1 ? 4 : 2) * (at_.split * a.dB_split + seq.row * a.dB_b + (seq.first + start) * a.dB_s + g * a.dB_g),
        a.splits == 1, int(a.dB_s), int(a.dB_r), b, live);
    if (Angles<Sh>::mine() && a.angle_heads == 1) {
      float* to = at<float>(a.dangle_k) + ((g * a.splits + at_.split) * a.tokens + token) * NA;
#pragma unroll
      for (int i = 0; i < Angles<Sh>::LONG; ++i)
        if (Angles<Sh>::token(i) < live) to[Angles<Sh>::token(i) * NA + Angles<Sh>::index()] = dangle[i];
    }
  }
}

}  // namespace nam56r::ssd
