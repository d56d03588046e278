// The forward scan: y and the final state, one block of 4 warps a sequence and unit (head, or 64 columns of one).
//
// With L_t the log decay summed since the chunk's start, and mix_ts = e^(L_t - L_s) w_s for s < t, own_t for s = t:
//   scores = q k^T   y = (mix * scores) v + e^L (q S^T) + D v   S <- e^(L_end) S + (e^(L_end - L) w v)^T k
// Rows: a warp takes a block of 16 rows for q k^T; its result goes to the others through shared memory, rounded.
// Columns: for everything else a warp takes 16 of the P columns, so that its part of the state, [16, N] in fp32, stays in
//   its registers and is, rounded, the B operand of q S^T as it lies there.
// Shared memory: q, k, x, z twice (the next chunk's are copied and turned during this one), the scores, the angles.
// Bound: for MIMO, issue slots: a chunk is 224 mma a warp, and turning, gates and operand loads are six times as many
//   instructions. Two barriers a chunk.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct ForwardShared {
  struct Stage {
    Tile<Sh::ROWS, Sh::N> q, k;
    Tile<Sh::CT, Sh::P> x, z;
    Decays<Sh> decays;
  };
  static constexpr int kStages = sizeof(Stage) <= 80 * 1024 ? 2 : 1;
  Stage stage[kStages];
  Tile<Sh::ROWS, Sh::ROWS> scores;
  Turns<Sh> turns;
  Biases<Sh> biases;
  float skip[Sh::R][Sh::P], zeta[Sh::kRanks ? Sh::R : 1][Sh::P], phi[Sh::kRanks ? Sh::R : 1][Sh::P];  // skip = D psi
};

template <typename T, int MODEL, int R, int P, int N>
__global__ void __launch_bounds__(128, 2) forward(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, P, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, THREADS = 128;
  extern __shared__ char bytes[];
  auto& s = *reinterpret_cast<ForwardShared<Sh>*>(bytes);
  constexpr int kStages = ForwardShared<Sh>::kStages;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
  const int H = int(a.H), blocks = gridDim.x / H, h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, g = h / int(a.heads_per_group);
  const int all_p = P * blocks, every = int(a.every);
  const Sequence seq = sequence(a, blockIdx.y);
  const int chunks = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * a.H + h, tokens = h * a.tokens + seq.token;
  const T* x = at<const T>(a.x) + seq.row * a.x_b + seq.first * a.x_s + h * a.x_h + p_first;
  const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + g * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
  const float* angles = at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h;
  const float* steps = at<const float>(a.DT) + tokens;
  T* y = at<T>(a.y) + ((seq.row * a.S + seq.first) * a.H + h) * all_p + p_first;
  const int y_s = H * all_p;
  const long long span = first_span(a, blockIdx.y);

  for (int i = threadIdx.x; i < R * P; i += THREADS) {
    const int r = i / P, p = i % P, from = (h * R + r) * all_p + p_first + p;
    const float d = a.D ? at<const float>(a.D)[h * a.d_h + (p_first + p) * a.d_p] : 0.f;
    s.skip[r][p] = Sh::kRanks ? d * at<const float>(a.psi)[from] : d;
    if (Sh::kRanks) s.zeta[r][p] = a.z ? at<const float>(a.zeta)[from] : 0.f, s.phi[r][p] = at<const float>(a.phi)[from];
  }

  const int p0 = warp * 16;
  const bool active = p0 < P;
  float psi[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
    for (int e = 0; e < 2; ++e)
      psi[r][e] = Sh::kRanks && active ? at<const float>(a.psi)[(h * R + r) * all_p + p_first + p0 + row + 8 * e] : 1.f;

  float S[N / 8][4] = {};
  const long long state = (unit * all_p + p_first + p0 + row) * N + col;
  if (a.state && active)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 v = *reinterpret_cast<const float2*>(at<const float>(a.state) + state + 8 * e * N + 8 * j);
        S[j][2 * e] = v.x, S[j][2 * e + 1] = v.y;
      }

  const auto copy = [&](int chunk) {
    auto& to = s.stage[chunk % kStages];
    const int t = chunk * CT, live = seq.length - t;
    copy_rows<Sh, 4>(to.q, C + t * a.C_s, int(a.C_s), int(a.C_r), live);
    copy_rows<Sh, 4>(to.k, B + t * a.B_s, int(a.B_s), int(a.B_r), live);
    copy_tokens<Sh, THREADS>(to.x, x + t * a.x_s, int(a.x_s), live);
    if (a.z) copy_tokens<Sh, THREADS>(to.z, z + t * a.z_s, int(a.z_s), live);
    copy_decays<Sh>(to.decays, a, tokens + t, live);
    commit();
  };
  Angles<Sh> angle;
  float base = 0.f;
  if (a.angle && Angles<Sh>::mine())
    base = fraction(at<const float>(a.angle)[unit * NA + Angles<Sh>::index()] * 0.15915494309189535f);
  const auto turns = [&](int chunk) {
    if (a.save && Angles<Sh>::mine() && threadIdx.x % Angles<Sh>::SEG == 0 && p_first == 0)
      at<float>(a.bases)[((span * every + chunk) * H + h) * NA + Angles<Sh>::index()] = base;
    base = fraction(base + angle.turn(s.turns, base));
  };
  const auto load_angles = [&](int chunk) {
    if (Sh::kTurns) angle.load(angles + chunk * CT * a.a_s, int(a.a_s), steps + chunk * CT, seq.length - chunk * CT);
  };
  const auto turn = [&](int chunk) {
    auto& to = s.stage[chunk % kStages];
    turn_rows<Sh, 4>(to.q, &to.k, s.biases, s.turns);
  };

  if (chunks) {
    copy_biases<Sh, THREADS>(s.biases, a, h);
    copy(0);
    if (Sh::kTurns) load_angles(0), turns(0);
    wait_copies();
    __syncthreads();
    turn(0);
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    auto& in = s.stage[chunk % kStages];
    const bool more = chunk + 1 < chunks;
    __syncthreads();  // q, k of this chunk are turned, the other stage and the angles are free
    if (kStages == 2 && more) copy(chunk + 1);
    if (more) load_angles(chunk + 1);

    // scores, by rows
#pragma unroll
    for (int b = warp; b < NB; b += 4) {
      const int tb = b % TB;
      unsigned q[N / 16][4];
#pragma unroll
      for (int k = 0; k < N / 16; ++k) in.q.a(q[k], b * 16, k * 16);
      const float l[2] = {in.decays.L[tb * 16 + row], in.decays.L[tb * 16 + row + 8]};
#pragma unroll
      for (int tc = 0; tc < TB; ++tc) {
        if (tc > tb) continue;
        float mix[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = n * 8 + col + e % 2, d = row + e / 2 * 8 + (tb - tc) * 16 - c, from = tc * 16 + c;
            const float below = exp_(l[e / 2] - in.decays.L[from]) * in.decays.w[from];
            mix[n][e] = d > 0 ? below : d == 0 ? own_weight(in.decays, from) : 0.f;
          }
        float m[R][2][4] = {};
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned kt[4];
            in.k.b(kt, (r * TB + tc) * 16, k * 16);
            Two::mma(m[r][0], q[k], kt[0], kt[1]);
            Two::mma(m[r][1], q[k], kt[2], kt[3]);
          }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              s.scores.put(b * 16 + row + 8 * e, (r * TB + tc) * 16 + n * 8 + col,
                           Two::pack(m[r][n][2 * e] * mix[n][2 * e], m[r][n][2 * e + 1] * mix[n][2 * e + 1]));
      }
    }

    // q S^T, by columns
    float out[NB][2][4] = {};
    if (active) {
      if (a.save && chunk % every == 0) {
        T* to = at<T>(a.saved) + (((span + chunk / every) * H + h) * all_p + p_first + p0 + row) * N + col;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            *reinterpret_cast<unsigned*>(to + 8 * e * N + 8 * j) = Two::pack(S[j][2 * e], S[j][2 * e + 1]);
      }
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        unsigned st[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* from = &S[2 * k + e % 2][e / 2 * 2];
          st[e] = Two::pack(from[0], from[1]);
        }
#pragma unroll
        for (int b = 0; b < NB; ++b) {
          unsigned q[4];
          in.q.a(q, b * 16, k * 16);
          Two::mma(out[b][0], q, st[0], st[1]);
          Two::mma(out[b][1], q, st[2], st[3]);
        }
      }
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        const float grow[2] = {exp_(in.decays.L[tb * 16 + row]), exp_(in.decays.L[tb * 16 + row + 8])};
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 8; ++e) out[r * TB + tb][e / 4][e % 4] *= grow[e % 4 / 2];
      }
    }
    if (more && Sh::kTurns) turns(chunk + 1);
    __syncthreads();  // scores, the next chunk's angles

    if (active) {
      // v [rows, 16 columns] as a B operand, and weighed for the state as an A operand, which is the same registers
      unsigned v[NB][4], weighed[NB][4];
      const float end = in.decays.L[CT - 1];
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xt[4];
        in.x.b_t(xt, tb * 16, p0);
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = tb * 16 + col + e % 2 + e / 2 * 8;
          w[e] = exp_(end - in.decays.L[t]) * in.decays.w[t];
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {  // e: columns e / 2 * 8, tokens e % 2 * 8
            float2 f = Two::unpack(xt[e]);
            if (Sh::kRanks) f.x *= psi[r][e / 2], f.y *= psi[r][e / 2];
            v[r * TB + tb][e] = Sh::kRanks ? Two::pack(f.x, f.y) : xt[e];
            weighed[r * TB + tb][e / 2 + e % 2 * 2] = Two::pack(f.x * w[e % 2 * 2], f.y * w[e % 2 * 2 + 1]);
          }
      }
#pragma unroll
      for (int c = 0; c < NB; ++c)
#pragma unroll
        for (int b = 0; b < NB; ++b) {
          if (c % TB > b % TB) continue;
          unsigned m[4];
          s.scores.a(m, b * 16, c * 16);
          Two::mma(out[b][0], m, v[c][0], v[c][1]);
          Two::mma(out[b][1], m, v[c][2], v[c][3]);
        }
      const float decay = exp_(end);
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[j][e] *= decay;
#pragma unroll
      for (int c = 0; c < NB; ++c)
#pragma unroll
        for (int j = 0; j < N / 16; ++j) {
          unsigned k[4];
          in.k.b_t(k, c * 16, j * 16);
          Two::mma(S[2 * j], weighed[c], k[0], k[1]);
          Two::mma(S[2 * j + 1], weighed[c], k[2], k[3]);
        }
      // gates, and the sum over ranks
#pragma unroll
      for (int tb = 0; tb < TB; ++tb)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int t = tb * 16 + row + 8 * e, p = p0 + n * 8 + col;
            const float2 xs = Two::unpack(in.x.pair(t, p));
            const float2 zs = a.z ? Two::unpack(in.z.pair(t, p)) : float2{0.f, 0.f};
            float2 sum = {0.f, 0.f};
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const float2 skip = *reinterpret_cast<const float2*>(&s.skip[r][p]);
              float2 o = {out[r * TB + tb][n][2 * e] + skip.x * xs.x, out[r * TB + tb][n][2 * e + 1] + skip.y * xs.y};
              float2 gate = zs, phi = {1.f, 1.f};
              if constexpr (Sh::kRanks) {
                const float2 zeta = *reinterpret_cast<const float2*>(&s.zeta[r][p]);
                phi = *reinterpret_cast<const float2*>(&s.phi[r][p]);
                gate.x *= zeta.x, gate.y *= zeta.y;
              }
              if (a.z) phi.x *= gate.x * sigmoid(gate.x), phi.y *= gate.y * sigmoid(gate.y);
              sum.x += o.x * phi.x, sum.y += o.y * phi.y;
            }
            if (chunk * CT + t < seq.length)
              *reinterpret_cast<unsigned*>(y + (long long)(chunk * CT) * y_s + t * y_s + p) = Two::pack(sum.x, sum.y);
          }
    }
    if (more) {
      if constexpr (kStages == 1) {
        __syncthreads();
        copy(chunk + 1);
      }
      wait_copies();
      turn(chunk + 1);
    }
  }

  if (active)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(at<float>(a.final) + state + 8 * e * N + 8 * j) = {S[j][2 * e], S[j][2 * e + 1]};
  if (Sh::kTurns && chunks) {
    const auto& in = s.stage[(chunks - 1) % kStages];
    const int last = (seq.length - 1) % CT;
    if (p_first == 0) {
      for (int i = threadIdx.x; i < R * N; i += THREADS) {
        const unsigned short* from = &in.k.x[(i / N * TB + last / 16) * 16 + last % 16][i % N / 2 * 2];
        const float2 f = Two::unpack(*reinterpret_cast<const unsigned*>(from));
        at<float>(a.final_k)[unit * R * N + i] = i % 2 ? f.y : f.x;
      }
      if (Angles<Sh>::mine() && threadIdx.x % Angles<Sh>::SEG == 0)
        at<float>(a.final_angle)[unit * NA + Angles<Sh>::index()] = base * 6.283185307179586f;
    }
    for (int i = threadIdx.x; i < R * P; i += THREADS) {
      const int r = i / P, p = i % P;
      const float2 f = Two::unpack(in.x.pair(last, p / 2 * 2));
      const long long to = (unit * R + r) * all_p + p_first + p;
      at<float>(a.final_v)[to] = (p % 2 ? f.y : f.x) * (Sh::kRanks ? at<const float>(a.psi)[(h * R + r) * all_p + p_first + p] : 1.f);
    }
  }
}

}  // namespace nam56r::ssd
