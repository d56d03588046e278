// The gradients of what a token reads with: C (through q), z, and Mimo's zeta and phi.
//
//   scores = q k^T, dm = dy v^T, M = scores * mix, Y = M v + e^L (q S^T)
//   dq = (dm * mix) k + e^L (dy S)
// A warp takes a block of 16 rows: scores, dm, Y and dq of its rows need nothing of the other warps; their accumulators
// are, rounded, the next products' A operands as they stand. S: from `saved` at the span's first chunk, then carried.
// Registers: the gradient of C [16, N], M and dm * mix [16, ROWS] rounded, dy [16, P] rounded, Y [16, P].
// Bound: issue slots; 384 mma a warp and chunk for MIMO at P 64, N 128.
#pragma once

#include "ssd/gradients.cuh"

namespace nam56r::ssd {

template <class Sh>
struct QueryShared {
  static constexpr bool kRanks = Sh::kRanks;
  Tile<Sh::ROWS, Sh::N> q, k;
  Tile<Sh::P, Sh::N> S;
  Tile<kRanks ? Sh::ROWS : 8, Sh::P> v;  // x itself without ranks
  Tile<Sh::CT, Sh::P> x, z, dy;
  Decays<Sh> decays;
  Turns<Sh> turns;
  Biases<Sh> biases;
  float turned[Sh::ROWS][Sh::NA + 4];
  float dz[kRanks ? Sh::ROWS : 1][Sh::P + 4];
  float bias[Sh::NB][Sh::N], zeta[kRanks ? Sh::NB : 1][Sh::P], phi[kRanks ? Sh::NB : 1][Sh::P];
  float dq[Sh::ROWS], down[Sh::ROWS], by_token[4][Sh::CT];
};

template <typename T, int MODEL, int R, int P, int N>
__global__ void __launch_bounds__(32 * Shape<T, MODEL, R, P, N>::NB, R == 8 ? 1 : 2) query(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, P, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, THREADS = 32 * NB;
  extern __shared__ char bytes[];
  auto& s = *reinterpret_cast<QueryShared<Sh>*>(bytes);

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

  for (int j = 0; j < at_.chunks; ++j) {
    const int start = (at_.chunk + j) * CT, live = seq.length - start;
    const long long token = seq.token + start;
    float dC[N / 8][4] = {};
    float dangle[Angles<Sh>::LONG] = {};
    for (int i = 0; i < units; ++i) {
      const int unit = (g * int(a.heads_per_group) * at_.blocks) + at_.split * units + i;
      const int h = unit / at_.blocks, p_first = unit % at_.blocks * P;
      const long long per_rank = ((long long)h * R + rank) * all_p + p_first;  // psi, zeta, phi of the warp's rank
      const long long state = ((at_.span * H + h) * all_p + p_first) * N;

      __syncthreads();  // the head before is done with shared memory
      copy_rows<Sh, NB>(s.q, C + start * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh, NB>(s.k, B + start * a.B_s, int(a.B_s), int(a.B_r), live);
      copy_biases<Sh, THREADS>(s.biases, a, h);
      const long long in_row = seq.first + start;
      copy_tokens<Sh, THREADS>(s.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live);
      copy_tokens<Sh, THREADS>(s.dy, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live);
      if (a.z)
        copy_tokens<Sh, THREADS>(s.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live);
      copy_decays<Sh>(s.decays, a, h * a.tokens + token, live);
      const T* S = at<const T>(j ? a.carried : a.saved) + state;
#pragma unroll 2
      for (int c = threadIdx.x; c < P * (N / 8); c += THREADS)
        copy16(&s.S.x[c / (N / 8)][c % (N / 8) * 8], S + c * 8, true);
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
      if constexpr (Sh::kRanks) {
        for (int c = lane; c < 16 * (P / 8); c += 32) {
          float v[8], psi[8];
          unpack8<T>(v, &s.x.x[tb * 16 + c / (P / 8)][c % (P / 8) * 8]);
          load8(psi, at<const float>(a.psi) + per_rank + c % (P / 8) * 8);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= psi[e];
          pack8<T>(&s.v.x[b * 16 + c / (P / 8)][c % (P / 8) * 8], v);
        }
      }
      __syncthreads();
      const auto& V = [&]() -> const auto& { if constexpr (Sh::kRanks) return s.v; else return s.x; }();

      // dy of the warp's rows, as an A operand
      const auto zeta_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(at<const float>(a.zeta) + per_rank + p) : float2{1.f, 1.f}; };
      const auto phi_at = [&](int p) { return Sh::kRanks ? *reinterpret_cast<const float2*>(at<const float>(a.phi) + per_rank + p) : float2{1.f, 1.f}; };
      unsigned dy[P / 16][4];
#pragma unroll
      for (int m = 0; m < P / 8; ++m) {
        const int p = m * 8 + col;
        const float2 phi = phi_at(p), zeta = a.z ? zeta_at(p) : float2{};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = tb * 16 + row + 8 * e;
          float2 d = Two::unpack(s.dy.pair(t, p));
          d.x *= phi.x, d.y *= phi.y;
          if (a.z) {
            const float2 z = Two::unpack(s.z.pair(t, p)), gate = {z.x * zeta.x, z.y * zeta.y};
            d.x *= gate.x * sigmoid(gate.x), d.y *= gate.y * sigmoid(gate.y);
          }
          dy[m / 2][m % 2 * 2 + e] = Two::pack(d.x, d.y);
        }
      }

      unsigned M[NB][4], dS[NB][4];
      float read[2] = {}, down[2] = {};  // L's gradient through y's reading, own's
      const float l[2] = {s.decays.L[tb * 16 + row], s.decays.L[tb * 16 + row + 8]};
      unsigned q[N / 16][4];
#pragma unroll
      for (int k = 0; k < N / 16; ++k) s.q.a(q[k], b * 16, k * 16);
#pragma unroll
      for (int tc = 0; tc < TB; ++tc) {
        if (tc > tb) continue;
        float mix[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = n * 8 + col + e % 2, d = row + e / 2 * 8 + (tb - tc) * 16 - c, from = tc * 16 + c;
            const float below = exp_(l[e / 2] - s.decays.L[from]) * s.decays.w[from];
            mix[n][e] = d > 0 ? below : d == 0 ? own_weight(s.decays, from) : 0.f;
          }
float m[R][2][4] = {}, dm[R][2][4] = {};
#pragma unroll
        for (int n = 0; n < N / 16; ++n)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned kt[4];
            s.k.b(kt, (r * TB + tc) * 16, n * 16);
            Two::mma(m[r][0], q[n], kt[0], kt[1]);
            Two::mma(m[r][1], q[n], kt[2], kt[3]);
          }
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned vt[4];
            V.b(vt, (r * TB + tc) * 16, p * 16);
            Two::mma(dm[r][0], dy[p], vt[0], vt[1]);
            Two::mma(dm[r][1], dy[p], vt[2], vt[3]);
          }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int c = r * TB + tc;
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool same = row + e / 2 * 8 + (tb - tc) * 16 == n * 8 + col + e % 2;
              const float both = m[r][n][e] * dm[r][n][e];
              down[e / 2] += same ? both : 0.f;
              read[e / 2] += same ? 0.f : both * mix[n][e];
              m[r][n][e] *= mix[n][e], dm[r][n][e] *= mix[n][e];
            }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            M[c][e] = Two::pack(m[r][e / 2][e % 2 * 2], m[r][e / 2][e % 2 * 2 + 1]);
            dS[c][e] = Two::pack(dm[r][e / 2][e % 2 * 2], dm[r][e / 2][e % 2 * 2 + 1]);
          }
        }
      }

      const float grow[2] = {exp_(l[0]), exp_(l[1])};
      {
        float Y[P / 8][4] = {};
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
#pragma unroll
          for (int p = 0; p < P / 16; ++p) {
            unsigned st[4];
            s.S.b(st, p * 16, k * 16);
            Two::mma(Y[2 * p], q[k], st[0], st[1]);
            Two::mma(Y[2 * p + 1], q[k], st[2], st[3]);
          }
#pragma unroll
        for (int m = 0; m < P / 8; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 d = Two::unpack(dy[m / 2][m % 2 * 2 + e]);
            Y[m][2 * e] *= grow[e], Y[m][2 * e + 1] *= grow[e];
            read[e] += d.x * Y[m][2 * e] + d.y * Y[m][2 * e + 1];
          }
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          if (tc > tb) continue;
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int p = 0; p < P / 16; ++p) {
              unsigned vt[4];
              V.b_t(vt, (r * TB + tc) * 16, p * 16);
              Two::mma(Y[2 * p], M[r * TB + tc], vt[0], vt[1]);
              Two::mma(Y[2 * p + 1], M[r * TB + tc], vt[2], vt[3]);
            }
        }
        // gates
        if (a.z || Sh::kRanks) {
#pragma unroll
          for (int four = 0; four < P / 32; ++four) {
            float dphi[8] = {}, dzeta[8] = {};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              const int p = (four * 4 + m) * 8 + col;
              const float2 phi = phi_at(p), zeta = a.z ? zeta_at(p) : float2{};
              float2 skip = {0.f, 0.f};
              if (a.D) {
                const float* D = at<const float>(a.D) + h * a.d_h;
                skip = {D[(p_first + p) * a.d_p], D[(p_first + p + 1) * a.d_p]};
              }
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int t = tb * 16 + row + 8 * e;
                const float2 d = Two::unpack(s.dy.pair(t, p)), v = Two::unpack(V.pair(b * 16 + row + 8 * e, p));
                const float(&from)[4] = Y[four * 4 + m];
                const float2 y = {from[2 * e] + skip.x * v.x, from[2 * e + 1] + skip.y * v.y};
                float2 silu = {1.f, 1.f};
                if (a.z) {
                  const float2 z = Two::unpack(s.z.pair(t, p)), gate = {z.x * zeta.x, z.y * zeta.y};
                  const float2 sg = {sigmoid(gate.x), sigmoid(gate.y)};
                  silu = {gate.x * sg.x, gate.y * sg.y};
                  const float2 dgate = {d.x * phi.x * y.x * sg.x * (1.f + gate.x - silu.x),
                                        d.y * phi.y * y.y * sg.y * (1.f + gate.y - silu.y)};
                  if constexpr (Sh::kRanks) {
                    dzeta[2 * m] += dgate.x * z.x, dzeta[2 * m + 1] += dgate.y * z.y;
                    *reinterpret_cast<float2*>(&s.dz[b * 16 + row + 8 * e][p]) = {dgate.x * zeta.x, dgate.y * zeta.y};
                  } else if (t < live) {
                    T* to = at<T>(a.dz) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p;
                    *reinterpret_cast<unsigned*>(to) = Two::pack(dgate.x, dgate.y);
                  }
                }
                dphi[2 * m] += d.x * silu.x * y.x, dphi[2 * m + 1] += d.y * silu.y * y.y;
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
        if (lane % 4 == 0) s.dq[b * 16 + row + 8 * e] = of_read, s.down[b * 16 + row + 8 * e] = of_down;
      }

      // dq, 32 columns at a time
#pragma unroll
      for (int group = 0; group < N / 32; ++group) {
        float acc[4][4] = {};
#pragma unroll
        for (int p = 0; p < P / 16; ++p)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            unsigned st[4];
            s.S.b_t(st, p * 16, column_of<Sh>(group, 2 * half));
            Two::mma(acc[2 * half], dy[p], st[0], st[1]);
            Two::mma(acc[2 * half + 1], dy[p], st[2], st[3]);
          }
#pragma unroll
        for (int e = 0; e < 16; ++e) acc[e / 4][e % 4] *= grow[e % 4 / 2];
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          if (tc > tb) continue;
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              unsigned kt[4];
              s.k.b_t(kt, (r * TB + tc) * 16, column_of<Sh>(group, 2 * half));
              Two::mma(acc[2 * half], dS[r * TB + tc], kt[0], kt[1]);
              Two::mma(acc[2 * half + 1], dS[r * TB + tc], kt[2], kt[3]);
            }
        }
        turn_back<Sh>(acc, group, b, s.q, s.turns, s.turned);
        float sums[8];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int c = column_of<Sh>(group, n);
#pragma unroll
          for (int e = 0; e < 4; ++e) dC[c / 8][e] += acc[n][e];
          sums[2 * n] = acc[n][0] + acc[n][2], sums[2 * n + 1] = acc[n][1] + acc[n][3];
        }
        if constexpr (Sh::kTurns) {
          const float sum = fold(sums);
          s.bias[b][column_of<Sh>(group, folded() / 2) + col + folded() % 2] = sum;
        }
      }

      // the state for the next chunk; a warp takes 16 of its rows, and some of its columns
      if (j + 1 < at_.chunks) {
        constexpr int SLICES = P / 16, PARTS = NB / SLICES, WIDTH = N / PARTS;
        const int p0 = b % SLICES * 16, n0 = b / SLICES * WIDTH;
        unsigned weighed[NB][4];
        const float end = s.decays.L[CT - 1], decay = exp_(end);
#pragma unroll
        for (int c = 0; c < TB; ++c) {
          unsigned xt[4];
          s.x.b_t(xt, c * 16, p0);
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
              float2 f = Two::unpack(xt[e]);
              if constexpr (Sh::kRanks) {
                const float psi = at<const float>(a.psi)[((long long)h * R + r) * all_p + p_first + p0 + row + e / 2 * 8];
                f.x *= psi, f.y *= psi;
              }
              weighed[r * TB + c][e / 2 + e % 2 * 2] = Two::pack(f.x * w[e % 2 * 2], f.y * w[e % 2 * 2 + 1]);
            }
        }
        T* to = at<T>(a.carried) + state + (p0 + row) * N + col;
#pragma unroll
        for (int n = 0; n < WIDTH; n += 16) {
          float acc[2][4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 f = Two::unpack(s.S.pair(p0 + row + e % 2 * 8, n0 + n + e / 2 * 8 + col));
            acc[e / 2][e % 2 * 2] = f.x * decay, acc[e / 2][e % 2 * 2 + 1] = f.y * decay;
          }
#pragma unroll
          for (int c = 0; c < NB; ++c) {
            unsigned kt[4];
            s.k.b_t(kt, c * 16, n0 + n);
            Two::mma(acc[0], weighed[c], kt[0], kt[1]);
            Two::mma(acc[1], weighed[c], kt[2], kt[3]);
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
        if (a.z)
          for (int c = threadIdx.x; c < CT * (P / 2); c += THREADS) {
            const int t = c / (P / 2), p = c % (P / 2) * 2;
            float2 sum = {0.f, 0.f};
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const float2 d = *reinterpret_cast<const float2*>(&s.dz[r * CT + t][p]);
              sum.x += d.x, sum.y += d.y;
            }
            if (t < live)
              *reinterpret_cast<unsigned*>(at<T>(a.dz) + ((seq.row * a.S + in_row + t) * H + h) * all_p + p_first + p) =
                  Two::pack(sum.x, sum.y);
          }
        for (int c = threadIdx.x; c < R * P; c += THREADS) {
          const int r = c / P, p = c % P;
          float of_phi = 0.f, of_zeta = 0.f;
#pragma unroll
          for (int i = 0; i < TB; ++i) of_phi += s.phi[r * TB + i][p], of_zeta += s.zeta[r * TB + i][p];
          const long long to = ((at_.span * H + h) * R + r) * all_p + p_first + p;
          add(at<float>(a.dphi) + to, of_phi, j == 0);
          if (a.z) add(at<float>(a.dzeta) + to, of_zeta, j == 0);
        }
      }
      if constexpr (Sh::kTurns) {
        for (int c = threadIdx.x; c < R * N; c += THREADS) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < TB; ++i) sum += s.bias[c / N * TB + i][c % N];
          add(at<float>(a.dC_bias) + (at_.span * U + unit) * R * N + c, sum, j == 0);
        }
        angle_gradients<Sh>(
            angle, s.turned, dangle, at<float>(a.total_q) + ((at_.span * a.every + j) * U + unit) * NA,
            a.angle_heads > 1 ? at<float>(a.dangle_q) + (unit * a.tokens + token) * NA : nullptr, s.by_token, live);
      }
      if (threadIdx.x < CT && threadIdx.x < live) {
        float read_ = 0.f, down_ = 0.f;
#pragma unroll
        for (int r = 0; r < R; ++r) read_ += s.dq[r * CT + threadIdx.x], down_ += s.down[r * CT + threadIdx.x];
        at<float>(a.DQ)[unit * a.tokens + token + threadIdx.x] = read_;
        at<float>(a.DOWN)[unit * a.tokens + token + threadIdx.x] = down_;
      }
      if constexpr (Sh::kTurns) {
        __syncthreads();
        if (threadIdx.x < CT && threadIdx.x < live) {
          const float(&by)[4][CT] = s.by_token;
          const int t = threadIdx.x;
          at<float>(a.ddt_q)[unit * a.tokens + token + t] = 3.141592653589793f * (by[0][t] + by[1][t] + by[2][t] + by[3][t]);
        }
      }
    }
    store_rows<Sh>(
        dC,
        at<char>(a.dC) + (a.splits > 1 ? 4 : 2) * (at_.split * a.dC_split + seq.row * a.dC_b + (seq.first + start) * a.dC_s + g * a.dC_g),
        a.splits == 1, int(a.dC_s), int(a.dC_r), b, live);
    if (Angles<Sh>::mine() && a.angle_heads == 1) {
      float* to = at<float>(a.dangle_q) + ((g * a.splits + at_.split) * a.tokens + token) * NA;
#pragma unroll
      for (int i = 0; i < Angles<Sh>::LONG; ++i)
        if (Angles<Sh>::token(i) < live) to[Angles<Sh>::token(i) * NA + Angles<Sh>::index()] = dangle[i];
    }
  }
}

}  // namespace nam56r::ssd
