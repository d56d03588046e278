// The gradients of what a token writes: B (through k), x, D, and MIMO's psi.
//
//   scores^T = k q^T, dm^T = v dy^T
//   dv = (scores * mix)^T dy + e^(L_end - L) w (k G^T) + D dy     dk = (dm * mix)^T q + e^(L_end - L) w (v G)
// As in query.cuh a warpgroup takes 64 rows, here of keys, and the chunks go backward; G is `carried`, which it overwrites.
// Registers: the gradient of B [16, N] a warp, both products with mix [16, ROWS] and v [16, P] rounded, dv [16, P].
#pragma once

#include "ssd/gradients.cuh"

namespace nam56r::ssd {

template <class Sh>
struct KeyShared {
  static constexpr bool kRanks = Sh::kRanks;
  Tile<Sh::ROWS, Sh::N> q, k;
  Tile<P, Sh::N> G;
  Tile<Sh::ROWS, P> dys;  // dy through the gates, of every rank
  Tile<Sh::CT, P> x, z;
  Tile<kRanks ? Sh::CT : 8, P> dy;  // without ranks it goes through the gate in place
  Decays<Sh> decays;
  Turns<Sh> turns;
  Biases<Sh> biases;
  Parameters<Sh> parameters;
  float turned[Sh::ROWS][Sh::NA + 4];
  float dx[kRanks ? Sh::ROWS : 1][P + 4];
  float bias[Sh::NB][Sh::N], psi[kRanks ? Sh::NB : 1][P], skip[Sh::NB][P];
  float dw[Sh::ROWS], by_token[4][Sh::CT];
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(R == 8 ? 256 : 128, R == 8 || N > 128 ? 1 : 2) key(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, ROWS = Sh::ROWS, THREADS = 32 * NB;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<KeyShared<Sh>*>(bytes);

  const int lane = threadIdx.x % 32, b = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
  const int rank = b / TB, tb = b % TB, mine = b * 16 + row;  // the warp's rank and tokens, the thread's rows mine, mine + 8
  const Place at_ = place(a, CT);
  if (at_.chunks <= 0) return;
  const Sequence& seq = at_.seq;
  const int g = at_.group, all_p = int(a.P), H = int(a.H), U = H * at_.blocks, units = int(a.units), width = min(P, all_p);
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + g * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
  const bool gated = a.z;
  Angles<Sh> angle;

  for (int j = at_.chunks - 1; j >= 0; --j) {
    const bool set = j == at_.chunks - 1;
    const int start_ = (at_.chunk + j) * CT, live = seq.length - start_;
    const long long token = seq.token + start_, in_row = seq.first + start_;
    float dB[2][2][N / 32][4] = {};
    for (int i = 0; i < units; ++i) {
      const int unit = g * int(a.heads_per_group) * at_.blocks + at_.split * units + i;
      const int h = unit / at_.blocks, p_first = unit % at_.blocks * P;
      T* carried = at<T>(a.carried) + ((at_.span * H + h) * all_p + p_first) * N;
      auto& raw = [&]() -> auto& { if constexpr (Sh::kRanks) return s.dy; else return s.dys; }();

      __syncthreads();  // the head before is done with shared memory
      copy_rows<Sh, NB>(s.q, C + start_ * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh, NB>(s.k, B + start_ * a.B_s, int(a.B_s), int(a.B_r), live);
      copy_tokens<Sh, THREADS>(s.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live, width);
      copy_tokens<Sh, THREADS>(raw, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live, width);
      if (gated)
        copy_tokens<Sh, THREADS>(s.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live, width);
      copy_state<Sh, THREADS>(s.G, carried, width);
      copy_decays<Sh>(s.decays, a, h * a.tokens + token, live);
      copy_biases<Sh, THREADS>(s.biases, a, h);
      copy_parameters<Sh, THREADS>(s.parameters, a, h, p_first, width);
      commit();
      if (Angles<Sh>::mine()) {
        const float base = at<const float>(a.bases)[((at_.span * a.every + j) * H + h) * NA + Angles<Sh>::index()];
        angle.load(
            at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s), live);
        angle.turn(s.turns, base, at<const float>(a.DT) + h * a.tokens + token, live);
      }
      wait_copies();
      __syncthreads();
      turn_rows<Sh, NB, true>(s.q, &s.k, s.biases, s.turns);
      if (Sh::kRanks || gated) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int r = (lane + n * 32) / 8, c = lane % 8 * 8, t = tb * 16 + r;
          float d[8], gate[8], more[8];
          unpack8<T>(d, get16(raw.unit(t, c)));
          unpack8<T>(gate, get16(s.z.unit(t, c)));
          if constexpr (Sh::kRanks) {
            load(more, &s.parameters.phi[rank][c]);
#pragma unroll
            for (int e = 0; e < 8; ++e) d[e] *= more[e];
            load(more, &s.parameters.zeta[rank][c]);
#pragma unroll
            for (int e = 0; e < 8; ++e) gate[e] *= more[e];
          }
#pragma unroll
          for (int e = 0; e < 8; ++e) d[e] *= silu(gate[e], gated);
          put16(s.dys.unit(b * 16 + r, c), pack8<T>(d));
        }
      }
      // v of the warp's rows, as an A operand
      const auto psi_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(&s.parameters.psi[rank][p]) : float2{1.f, 1.f}; };
      unsigned v[P / 16][4];
#pragma unroll
      for (int m = 0; m < P / 8; ++m) {
        const float2 psi = psi_at(m * 8 + col);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned xs = s.x.pair(tb * 16 + row + 8 * e, m * 8 + col);
          const float2 f = Two::unpack(xs);
          v[m / 2][m % 2 * 2 + e] = Sh::kRanks ? Two::pack(f.x * psi.x, f.y * psi.y) : xs;
        }
      }
      publish();
      __syncthreads();

      const int first = b / 4 * 64;  // row of the warpgroup
      const float end = s.decays.L[CT - 1];
      const float l[2] = {s.decays.L[tb * 16 + row], s.decays.L[tb * 16 + row + 8]}, left[2] = {exp_(end - l[0]), exp_(end - l[1])};
      const float w[2] = {s.decays.w[tb * 16 + row], s.decays.w[tb * 16 + row + 8]};
      float later[2] = {};  // w's gradient
      unsigned M[NB][4], dS[NB][4];
      const float own[2] = {own_weight(s.decays, tb * 16 + row), own_weight(s.decays, tb * 16 + row + 8)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr int n = ROWS / 2;
        float m[n / 8][4], dm[n / 8][4];
        start();
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
          k ? Product<T, n>::template shared<kAcross>(m, s.k.descriptor(first, k * 16), s.q.descriptor(half * n, k * 16))
            : Product<T, n>::template shared<kAcross, 0>(m, s.k.descriptor(first, 0), s.q.descriptor(half * n, 0));
#pragma unroll
        for (int k = 0; k < P / 16; ++k)
          k ? Product<T, n>::template held<kAcross>(dm, v[k], s.dys.descriptor(half * n, k * 16))
            : Product<T, n>::template held<kAcross, 0>(dm, v[k], s.dys.descriptor(half * n, 0));
        finish();
#pragma unroll
        for (int i_ = 0; i_ < NB / 2; ++i_) {
          const int c = half * NB / 2 + i_, tc = c % TB;
#pragma unroll
          for (int e8 = 0; e8 < 8; ++e8) {
            const int n8 = e8 / 4, e = e8 % 4, on = n8 * 8 + col + e % 2;
            const int d = on + (tc - tb) * 16 - row - e / 2 * 8;  // how much later the query is
            const float since = exp_(s.decays.L[tc * 16 + on] - l[e / 2]), decay = d > 0 ? since : 0.f;
            const float mix = d == 0 ? own[e / 2] : decay * w[e / 2];
            float &x = m[2 * i_ + n8][e], &dx = dm[2 * i_ + n8][e];
            later[e / 2] += x * dx * decay;
            x *= mix, dx *= mix;
          }
          operand<T>(M[c], m[2 * i_], m[2 * i_ + 1]);
          operand<T>(dS[c], dm[2 * i_], dm[2 * i_ + 1]);
        }
      }
      {
        float dv[P / 8][4];
        start();
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
          k ? Product<T, P>::template shared<kAcross>(dv, s.k.descriptor(first, k * 16), s.G.descriptor(0, k * 16))
            : Product<T, P>::template shared<kAcross, 0>(dv, s.k.descriptor(first, 0), s.G.descriptor(0, 0));
        finish();
#pragma unroll
        for (int m = 0; m < P / 8; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 f = Two::unpack(v[m / 2][m % 2 * 2 + e]);
            dv[m][2 * e] *= left[e], dv[m][2 * e + 1] *= left[e];
            later[e] += f.x * dv[m][2 * e] + f.y * dv[m][2 * e + 1];
            dv[m][2 * e] *= w[e], dv[m][2 * e + 1] *= w[e];
          }
        start();
#pragma unroll
        for (int c = 0; c < NB; ++c) Product<T, P>::template held<kAlong>(dv, M[c], s.dys.descriptor(c * 16, 0));
        finish();
#pragma unroll
        for (int four = 0; four < P / 32; ++four) {
          float dpsi[8] = {}, dskip[8] = {};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int p = (four * 4 + m) * 8 + col;
            const float2 psi = psi_at(p), skip = *reinterpret_cast<const float2*>(&s.parameters.skip[p]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int t = tb * 16 + row + 8 * e;
              const float2 d = Two::unpack(s.dys.pair(mine + 8 * e, p)), x = Two::unpack(s.x.pair(t, p));
              const float(&from)[4] = dv[four * 4 + m];
              const float2 sum = {from[2 * e] + skip.x * d.x, from[2 * e + 1] + skip.y * d.y};
              dskip[2 * m] += d.x * x.x * psi.x, dskip[2 * m + 1] += d.y * x.y * psi.y;
              if constexpr (Sh::kRanks) {
                dpsi[2 * m] += sum.x * x.x, dpsi[2 * m + 1] += sum.y * x.y;
                *reinterpret_cast<float2*>(&s.dx[mine + 8 * e][p]) = {sum.x * psi.x, sum.y * psi.y};
              } else if (t < live && p < width) {
                T* to = at<T>(a.dx) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p;
                *reinterpret_cast<unsigned*>(to) = Two::pack(sum.x, sum.y);
              }
            }
          }
          const int p = (four * 4 + folded() / 2) * 8 + col + folded() % 2;
          const float of_skip = fold(dskip);
          s.skip[b][p] = of_skip;
          if constexpr (Sh::kRanks) {
            const float of_psi = fold(dpsi);
            s.psi[b][p] = of_psi;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = over_quad(later[e]);
        if (lane % 4 == 0) s.dw[mine + 8 * e] = sum;
      }

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dk[2][N / 32][4];
        start();
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            p ? Product<T, N / 4>::template held<kAlong>(dk[n], v[p], s.G.descriptor(p * 16, piece<Sh>(half, n)))
              : Product<T, N / 4>::template held<kAlong, 0>(dk[n], v[p], s.G.descriptor(0, piece<Sh>(half, n)));
        finish();
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dk[n / (N / 32)][n % (N / 32)][e] *= left[e / 2] * w[e / 2];
        start();
#pragma unroll
        for (int c = 0; c < NB; ++c)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            Product<T, N / 4>::template held<kAlong>(dk[n], dS[c], s.q.descriptor(c * 16, piece<Sh>(half, n)));
        finish();
        if (half == 0) turn_back<Sh>(dk, b, s.k, s.turns, s.turned);
        add_half<Sh>(dB[half], dk, half, s.bias[b]);
      }

      if (b < 4 && j) {  // G for the chunk before
        const int p0 = b % 4 * 16;
        unsigned grown[NB][4];
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          float grow[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) grow[e] = exp_(s.decays.L[tc * 16 + col + e % 2 + e / 2 * 8]);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned d[4];
            s.dys.columns(d, (r * TB + tc) * 16, p0);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float2 f = Two::unpack(d[e]);
              grown[r * TB + tc][e / 2 + e % 2 * 2] = Two::pack(f.x * grow[e % 2 * 2], f.y * grow[e % 2 * 2 + 1]);
            }
          }
        }
        next_state<Sh>(carried, s.G, exp_(end), grown, s.q, width);
      }
      angle.load(at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s), live);
      __syncthreads();

      // sums over ranks, tokens and angles
      if constexpr (Sh::kRanks) {
#pragma unroll
        for (int n = 0; n < (CT * (P / 2) + THREADS - 1) / THREADS; ++n) {
          const int c = threadIdx.x + n * THREADS, t = c / (P / 2), p = c % (P / 2) * 2;
          float2 sum = {0.f, 0.f};
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float2 d = *reinterpret_cast<const float2*>(&s.dx[r * CT + t][p]);
            sum.x += d.x, sum.y += d.y;
          }
          if (t < live && p < width)
            *reinterpret_cast<unsigned*>(at<T>(a.dx) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p) =
                Two::pack(sum.x, sum.y);
        }
#pragma unroll
        for (int n = 0; n < (R * P + THREADS - 1) / THREADS; ++n) {
          const int c = threadIdx.x + n * THREADS;
          if (c >= R * P || c % P >= width) continue;
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < TB; ++e) sum += s.psi[c / P * TB + e][c % P];
          add(at<float>(a.dpsi) + ((at_.span * H + h) * R + c / P) * all_p + p_first + c % P, sum, set);
        }
      }
      if (a.dD && threadIdx.x < width) {
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < NB; ++e) sum += s.skip[e][threadIdx.x];
        add(at<float>(a.dD) + (at_.span * H + h) * all_p + p_first + threadIdx.x, sum, set);
      }
      if constexpr (Sh::kTurns) {
#pragma unroll
        for (int n = 0; n < (R * N + THREADS - 1) / THREADS; ++n) {
          const int c = threadIdx.x + n * THREADS;
          if (c >= R * N) continue;
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < TB; ++e) sum += s.bias[c / N * TB + e][c % N];
          add(at<float>(a.dB_bias) + (at_.span * U + unit) * R * N + c, sum, set);
        }
        float* to = a.angle_heads > 1 ? at<float>(a.dangle_k) + (unit * a.tokens + token) * NA
                                      : at<float>(a.dangle_k) + ((g * a.splits + at_.split) * a.tokens + token) * NA;
        angle_gradients<Sh>(
            angle, s.turned, s.decays, to, i == 0 || a.angle_heads > 1,
            at<float>(a.total_k) + ((at_.span * a.every + j) * U + unit) * NA, s.by_token, live);
      }
      const int t = int(threadIdx.x) - (THREADS - CT);
      if (t >= 0 && t < live) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < R; ++r) sum += s.dw[r * CT + t];
        at<float>(a.DW)[unit * a.tokens + token + t] = sum;
      }
      if constexpr (Sh::kTurns) {
        __syncthreads();
        if (t >= 0 && t < live) {
          const float(&by)[4][CT] = s.by_token;
          at<float>(a.ddt_k)[unit * a.tokens + token + t] = PI * (by[0][t] + by[1][t] + by[2][t] + by[3][t]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_half<Sh>(
          dB[half], half,
          at<char>(a.dB) + (a.splits > 1 ? 4 : 2) * (at_.split * a.dB_split + seq.row * a.dB_b + in_row * a.dB_s + g * a.dB_g),
          a.splits == 1, int(a.dB_s), int(a.dB_r), b, live);
  }
}

}  // namespace nam56r::ssd
