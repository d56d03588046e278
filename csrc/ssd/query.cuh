// The gradients of what a token reads with: C (through q), z, and MIMO's zeta and phi.
//
//   scores = q k^T, dm = dy v^T, M = scores * mix, Y = M v + e^L (q S^T)
//   dq = (dm * mix) k + e^L (dy S)
// A warpgroup takes 64 rows; the accumulators of a product are, rounded, the A operand of the next as they lie there.
// S: from `saved` at the span's first chunk, then carried. Shared memory: q, k, S, v as operands, and what is summed over
// ranks. Registers: the gradient of C [16, N] a warp, dq [16, N], M and dm * mix [16, ROWS] and dy [16, P] rounded.
// Bound: issue slots, in turning, gates and sums; 5 MFLOP a chunk for MIMO at N 128.
#pragma once

#include "ssd/gradients.cuh"

namespace nam56r::ssd {

template <class Sh>
struct QueryShared {
  static constexpr bool kRanks = Sh::kRanks;
  Tile<Sh::ROWS, Sh::N> q, k;
  Tile<P, Sh::N> S;
  Tile<kRanks ? Sh::ROWS : 8, P> v;  // x itself without ranks
  Tile<Sh::CT, P> x, z, dy;
  Decays<Sh> decays;
  Turns<Sh> turns;
  Biases<Sh> biases;
  Parameters<Sh> parameters;
  float turned[Sh::ROWS][Sh::NA + 4];
  float dz[kRanks ? Sh::ROWS : 1][P + 4];
  float bias[Sh::NB][Sh::N], zeta[kRanks ? Sh::NB : 1][P], phi[kRanks ? Sh::NB : 1][P];
  float dq[Sh::ROWS], down[Sh::ROWS], by_token[4][Sh::CT];
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(R == 8 ? 256 : 128, R == 8 || N > 128 ? 1 : 2) query(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, ROWS = Sh::ROWS, THREADS = 32 * NB;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<QueryShared<Sh>*>(bytes);

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

  for (int j = 0; j < at_.chunks; ++j) {
    const int start_ = (at_.chunk + j) * CT, live = seq.length - start_;
    const long long token = seq.token + start_, in_row = seq.first + start_;
    float dC[2][2][N / 32][4] = {};
    for (int i = 0; i < units; ++i) {
      const int unit = g * int(a.heads_per_group) * at_.blocks + at_.split * units + i;
      const int h = unit / at_.blocks, p_first = unit % at_.blocks * P;
      const long long state = ((at_.span * H + h) * all_p + p_first) * N;

      __syncthreads();  // the head before is done with shared memory
      copy_rows<Sh, NB>(s.q, C + start_ * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh, NB>(s.k, B + start_ * a.B_s, int(a.B_s), int(a.B_r), live);
      copy_tokens<Sh, THREADS>(s.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live, width);
      copy_tokens<Sh, THREADS>(s.dy, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live, width);
      if (gated)
        copy_tokens<Sh, THREADS>(s.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live, width);
      copy_state<Sh, THREADS>(s.S, at<const T>(j ? a.carried : a.saved) + state, width);
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
      if constexpr (Sh::kRanks) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int r = (lane + n * 32) / 8, c = lane % 8 * 8;
          float v[8], psi[8];
          unpack8<T>(v, get16(s.x.unit(tb * 16 + r, c)));
          load(psi, &s.parameters.psi[rank][c]);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= psi[e];
          put16(s.v.unit(b * 16 + r, c), pack8<T>(v));
        }
      }
      // dy of the warp's rows, as an A operand
      const auto zeta_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(&s.parameters.zeta[rank][p]) : float2{1.f, 1.f}; };
      const auto phi_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(&s.parameters.phi[rank][p]) : float2{1.f, 1.f}; };
      unsigned dy[P / 16][4];
#pragma unroll
      for (int m = 0; m < P / 8; ++m) {
        const int p = m * 8 + col;
        const float2 phi = phi_at(p), zeta = zeta_at(p);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = tb * 16 + row + 8 * e;
          float2 d = Two::unpack(s.dy.pair(t, p));
          d.x *= phi.x, d.y *= phi.y;
          const float2 z = Two::unpack(s.z.pair(t, p));
          d.x *= silu(z.x * zeta.x, gated), d.y *= silu(z.y * zeta.y, gated);
          dy[m / 2][m % 2 * 2 + e] = Two::pack(d.x, d.y);
        }
      }
      publish();
      __syncthreads();
      const auto& v = [&]() -> const auto& { if constexpr (Sh::kRanks) return s.v; else return s.x; }();

      const float l[2] = {s.decays.L[tb * 16 + row], s.decays.L[tb * 16 + row + 8]}, grow[2] = {exp_(l[0]), exp_(l[1])};
      const int first = b / 4 * 64;  // row of the warpgroup
      unsigned M[NB][4], dS[NB][4];
      float read[2] = {}, down[2] = {};  // L's gradient through y's reading, own's
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr int n = ROWS / 2;
        float m[n / 8][4], dm[n / 8][4];
        start();
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
          k ? Product<T, n>::template shared<kAcross>(m, s.q.descriptor(first, k * 16), s.k.descriptor(half * n, k * 16))
            : Product<T, n>::template shared<kAcross, 0>(m, s.q.descriptor(first, 0), s.k.descriptor(half * n, 0));
#pragma unroll
        for (int k = 0; k < P / 16; ++k)
          k ? Product<T, n>::template held<kAcross>(dm, dy[k], v.descriptor(half * n, k * 16))
            : Product<T, n>::template held<kAcross, 0>(dm, dy[k], v.descriptor(half * n, 0));
        finish();
#pragma unroll
        for (int i_ = 0; i_ < NB / 2; ++i_) {
          const int c = half * NB / 2 + i_, tc = c % TB;
#pragma unroll
          for (int e8 = 0; e8 < 8; ++e8) {
            const int n8 = e8 / 4, e = e8 % 4, on = n8 * 8 + col + e % 2, from = tc * 16 + on;
            const int d = row + e / 2 * 8 + (tb - tc) * 16 - on;
            const float below = exp_(l[e / 2] - s.decays.L[from]) * s.decays.w[from];
            const float mix = d > 0 ? below : d == 0 ? own_weight(s.decays, from) : 0.f;
            float &x = m[2 * i_ + n8][e], &dx = dm[2 * i_ + n8][e];
            const float both = x * dx;
            down[e / 2] += d == 0 ? both : 0.f;
            read[e / 2] += d == 0 ? 0.f : both * mix;
            x *= mix, dx *= mix;
          }
          operand<T>(M[c], m[2 * i_], m[2 * i_ + 1]);
          operand<T>(dS[c], dm[2 * i_], dm[2 * i_ + 1]);
        }
      }
      {
        float Y[P / 8][4];
        start();
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
          k ? Product<T, P>::template shared<kAcross>(Y, s.q.descriptor(first, k * 16), s.S.descriptor(0, k * 16))
            : Product<T, P>::template shared<kAcross, 0>(Y, s.q.descriptor(first, 0), s.S.descriptor(0, 0));
        finish();
#pragma unroll
        for (int m = 0; m < P / 8; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 d = Two::unpack(dy[m / 2][m % 2 * 2 + e]);
            Y[m][2 * e] *= grow[e], Y[m][2 * e + 1] *= grow[e];
            read[e] += d.x * Y[m][2 * e] + d.y * Y[m][2 * e + 1];
          }
        start();
#pragma unroll
        for (int c = 0; c < NB; ++c) Product<T, P>::template held<kAlong>(Y, M[c], v.descriptor(c * 16, 0));
        finish();
        // gates
        if (gated || Sh::kRanks) {
#pragma unroll
          for (int four = 0; four < P / 32; ++four) {
            float dphi[8] = {}, dzeta[8] = {};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              const int p = (four * 4 + m) * 8 + col;
              const float2 phi = phi_at(p), zeta = zeta_at(p), skip = *reinterpret_cast<const float2*>(&s.parameters.skip[p]);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int t = tb * 16 + row + 8 * e;
                const float2 d = Two::unpack(s.dy.pair(t, p)), vs = Two::unpack(v.pair(mine + 8 * e, p));
                const float(&from)[4] = Y[four * 4 + m];
                const float2 y = {from[2 * e] + skip.x * vs.x, from[2 * e + 1] + skip.y * vs.y};
                const float2 z = Two::unpack(s.z.pair(t, p)), gate = {z.x * zeta.x, z.y * zeta.y};
                const float2 sg = {sigmoid(gate.x), sigmoid(gate.y)}, silu = {gate.x * sg.x, gate.y * sg.y};
                const float2 dgate = {d.x * phi.x * y.x * sg.x * (1.f + gate.x - silu.x),
                                      d.y * phi.y * y.y * sg.y * (1.f + gate.y - silu.y)};
                if constexpr (Sh::kRanks) {
                  dphi[2 * m] += d.x * y.x * (gated ? silu.x : 1.f), dphi[2 * m + 1] += d.y * y.y * (gated ? silu.y : 1.f);
                  dzeta[2 * m] += dgate.x * z.x, dzeta[2 * m + 1] += dgate.y * z.y;
                  *reinterpret_cast<float2*>(&s.dz[mine + 8 * e][p]) = {dgate.x * zeta.x, dgate.y * zeta.y};
                } else if (gated && t < live && p < width) {
                  T* to = at<T>(a.dz) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p;
                  *reinterpret_cast<unsigned*>(to) = Two::pack(dgate.x, dgate.y);
                }
              }
            }
            if constexpr (Sh::kRanks) {
              const float of_phi = fold(dphi), of_zeta = fold(dzeta);
              const int p = (four * 4 + folded() / 2) * 8 + col + folded() % 2;
              s.phi[b][p] = of_phi, s.zeta[b][p] = of_zeta;
            }
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float of_read = over_quad(read[e]), of_down = over_quad(down[e]);
        if (lane % 4 == 0) s.dq[mine + 8 * e] = of_read, s.down[mine + 8 * e] = of_down;
      }

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dq[2][N / 32][4];
        start();
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            p ? Product<T, N / 4>::template held<kAlong>(dq[n], dy[p], s.S.descriptor(p * 16, piece<Sh>(half, n)))
              : Product<T, N / 4>::template held<kAlong, 0>(dq[n], dy[p], s.S.descriptor(0, piece<Sh>(half, n)));
        finish();
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dq[n / (N / 32)][n % (N / 32)][e] *= grow[e / 2];
        start();
#pragma unroll
        for (int c = 0; c < NB; ++c)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            Product<T, N / 4>::template held<kAlong>(dq[n], dS[c], s.k.descriptor(c * 16, piece<Sh>(half, n)));
        finish();
        if (half == 0) turn_back<Sh>(dq, b, s.q, s.turns, s.turned);
        add_half<Sh>(dC[half], dq, half, s.bias[b]);
      }

      if (b < 4 && j + 1 < at_.chunks) {  // the state for the next chunk
        const int p0 = b % 4 * 16;
        const float end = s.decays.L[CT - 1];
        unsigned weighed[NB][4];
#pragma unroll
        for (int c = 0; c < TB; ++c) {
          unsigned xs[4];
          s.x.columns(xs, c * 16, p0);
          float w[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int t = c * 16 + col + e % 2 + e / 2 * 8;
            w[e] = exp_(end - s.decays.L[t]) * s.decays.w[t];
          }
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float2 f = Two::unpack(xs[e]);
              if constexpr (Sh::kRanks) {
                const float psi = s.parameters.psi[r][p0 + row + e / 2 * 8];
                f.x *= psi, f.y *= psi;
              }
              weighed[r * TB + c][e / 2 + e % 2 * 2] = Two::pack(f.x * w[e % 2 * 2], f.y * w[e % 2 * 2 + 1]);
            }
        }
        next_state<Sh>(at<T>(a.carried) + state, s.S, exp_(end), weighed, s.k, width);
      }
      angle.load(at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s), live);
      __syncthreads();

      // sums over ranks, tokens and angles
      if constexpr (Sh::kRanks) {
        if (gated)
#pragma unroll
          for (int n = 0; n < (CT * (P / 2) + THREADS - 1) / THREADS; ++n) {
            const int c = threadIdx.x + n * THREADS, t = c / (P / 2), p = c % (P / 2) * 2;
            float2 sum = {0.f, 0.f};
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const float2 d = *reinterpret_cast<const float2*>(&s.dz[r * CT + t][p]);
              sum.x += d.x, sum.y += d.y;
            }
            if (t < live && p < width)
              *reinterpret_cast<unsigned*>(at<T>(a.dz) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p) =
                  Two::pack(sum.x, sum.y);
          }
#pragma unroll
        for (int n = 0; n < (R * P + THREADS - 1) / THREADS; ++n) {
          const int c = threadIdx.x + n * THREADS, r = c / P, p = c % P;
          if (c >= R * P || p >= width) continue;
          float of_phi = 0.f, of_zeta = 0.f;
#pragma unroll
          for (int i = 0; i < TB; ++i) of_phi += s.phi[r * TB + i][p], of_zeta += s.zeta[r * TB + i][p];
          const long long to = ((at_.span * H + h) * R + r) * all_p + p_first + p;
          add(at<float>(a.dphi) + to, of_phi, j == 0);
          if (gated) add(at<float>(a.dzeta) + to, of_zeta, j == 0);
        }
      }
      if constexpr (Sh::kTurns) {
#pragma unroll
        for (int n = 0; n < (R * N + THREADS - 1) / THREADS; ++n) {
          const int c = threadIdx.x + n * THREADS;
          if (c >= R * N) continue;
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < TB; ++i) sum += s.bias[c / N * TB + i][c % N];
          add(at<float>(a.dC_bias) + (at_.span * U + unit) * R * N + c, sum, j == 0);
        }
        float* to = a.angle_heads > 1 ? at<float>(a.dangle_q) + (unit * a.tokens + token) * NA
                                      : at<float>(a.dangle_q) + ((g * a.splits + at_.split) * a.tokens + token) * NA;
        angle_gradients<Sh>(
            angle, s.turned, s.decays, to, i == 0 || a.angle_heads > 1,
            at<float>(a.total_q) + ((at_.span * a.every + j) * U + unit) * NA, s.by_token, live);
      }
      const int t = int(threadIdx.x) - (THREADS - CT);
      if (t >= 0 && t < live) {
        float read_ = 0.f, down_ = 0.f;
#pragma unroll
        for (int r = 0; r < R; ++r) read_ += s.dq[r * CT + t], down_ += s.down[r * CT + t];
        at<float>(a.DQ)[unit * a.tokens + token + t] = read_;
        at<float>(a.DOWN)[unit * a.tokens + token + t] = down_;
      }
      if constexpr (Sh::kTurns) {
        __syncthreads();
        if (t >= 0 && t < live) {
          const float(&by)[4][CT] = s.by_token;
          at<float>(a.ddt_q)[unit * a.tokens + token + t] = PI * (by[0][t] + by[1][t] + by[2][t] + by[3][t]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_half<Sh>(
          dC[half], half,
          at<char>(a.dC) + (a.splits > 1 ? 4 : 2) * (at_.split * a.dC_split + seq.row * a.dC_b + in_row * a.dC_s + g * a.dC_g),
          a.splits == 1, int(a.dC_s), int(a.dC_r), b, live);
  }
}

}  // namespace nam56r::ssd
