// The forward scan: y and the final state, one block of two warpgroups a sequence and unit (head, or 64 columns of one).
//
// With L_t the log decay summed since the chunk's start, and mix_ts = e^(L_t - L_s) w_s for s < t, own_t for s = t:
//   scores = q k^T   y^T = v^T (mix * scores)^T + e^L (S q^T) + D v^T   S <- e^(L_end) S + (e^(L_end - L) w v)^T k
// One warpgroup makes q and k, a chunk ahead: copies B and C, adds the biases, turns them. The other has all four
// products. y is made transposed, [P, rows], so that S [P, N], which stays in registers in fp32, is, rounded, the A operand
// of S q^T as it lies there, and so that a thread has all ranks of its tokens: the sum over ranks is its own.
// Shared memory: q and k, twice where two blocks then still fit an SM; x, z, which y leaves through; the scores; the angles.
// Bound: issue slots: turning on the one side, decays and gates on the other.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct ForwardShared {
  struct Stage {
    Tile<Sh::ROWS, Sh::N> q, k;
  };
  static constexpr int kStages = sizeof(Stage) <= 64 * 1024 ? 2 : 1;
  Stage stage[kStages];
  Tile<Sh::ROWS, Sh::ROWS> scores;
  Tile<Sh::CT, P> x, z;
  Decays<Sh> decays[kStages];
  Turns<Sh> turns;
  Biases<Sh> biases;
  Parameters<Sh> parameters;
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(256, N > 128 || R > 4 ? 1 : 2) forward(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  using Angle = Angles<Sh, 1>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, ROWS = Sh::ROWS;
  constexpr bool kMoves = N <= 128 && R <= 4;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<ForwardShared<Sh>*>(bytes);
  constexpr int kStages = ForwardShared<Sh>::kStages;

  const int H = int(a.H), all_p = int(a.P), every = int(a.every), blocks = gridDim.x / H;
  const int h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, width = min(P, all_p), g = h / int(a.heads_per_group);
  const Sequence seq = sequence(a, blockIdx.y);
  const int chunks = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * H + h, tokens = h * a.tokens + seq.token;
  const long long span = first_span(a, blockIdx.y);

  copy_biases<Sh, 256>(s.biases, a, h);
  copy_parameters<Sh, 256>(s.parameters, a, h, p_first, width);
  commit();
  wait_copies();
  __syncthreads();

  if (threadIdx.x >= 128) {
    if constexpr (kMoves) give_registers();
    const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + g * a.B_g;
    const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
    const float* angles = at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h;
    const float* steps = at<const float>(a.DT) + tokens;
    Angle angle;
    float base = 0.f;
    if (a.angle && Angle::mine())
      base = fraction(at<const float>(a.angle)[unit * NA + Angle::index()] * 0.15915494309189535f);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      auto& to = s.stage[chunk % kStages];
      const int t = chunk * CT, live = seq.length - t;
      if (chunk >= kStages) wait_at(kEmpty + chunk % kStages, 256);
      copy_rows<Sh, 4>(to.q, C + t * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh, 4>(to.k, B + t * a.B_s, int(a.B_s), int(a.B_r), live);
      copy_decays<Sh>(s.decays[chunk % kStages], a, tokens + t, live);
      commit();
      if constexpr (Sh::kTurns) {
        angle.load(angles + t * a.a_s, int(a.a_s), live);
        if (a.save && threadIdx.x % Angle::SEG == 0 && p_first == 0)
          at<float>(a.bases)[((span * every + chunk) * H + h) * NA + Angle::index()] = base;
        wait_at(kTurning, 128);  // the chunk before is turned
        base = fraction(base + angle.turn(s.turns, base, steps + t, live));
      }
      wait_copies();
      wait_at(kTurning, 128);
      turn_rows<Sh, 4>(to.q, &to.k, s.biases, s.turns);
      publish();
      arrive_at(kFull + chunk % kStages, 256);
    }
    if (Sh::kTurns && chunks && p_first == 0 && threadIdx.x % Angle::SEG == 0)
      at<float>(a.final_angle)[unit * NA + Angle::index()] = base * 6.283185307179586f;
  } else {
    if constexpr (kMoves) take_registers();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
    const T* x = at<const T>(a.x) + seq.row * a.x_b + seq.first * a.x_s + h * a.x_h + p_first;
    const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
    T* y = at<T>(a.y) + ((seq.row * a.S + seq.first) * H + h) * all_p + p_first;
    const int y_s = H * all_p;
    const bool gated = a.z;

    // the thread's columns of P: p[0] and p[1]
    const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
    const long long state = (unit * all_p + p_first + p[0]) * N + col;
    float S[N / 8][4] = {};
    if (a.state)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (p[e] < width) {
            const float2 v = *reinterpret_cast<const float2*>(at<const float>(a.state) + state + 8 * e * N + 8 * j);
            S[j][2 * e] = v.x, S[j][2 * e + 1] = v.y;
          }
    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };
    const auto copy = [&](int chunk) {  // what only this warp reads
      const int t = chunk * CT, live = seq.length - t;
      copy_columns<Sh>(s.x, x + t * a.x_s, int(a.x_s), live, p0, width);
      if (gated) copy_columns<Sh>(s.z, z + t * a.z_s, int(a.z_s), live, p0, width);
      commit();
    };

    if (chunks) copy(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const auto& in = s.stage[chunk % kStages];
      const auto& decays = s.decays[chunk % kStages];
      wait_at(kFull + chunk % kStages, 256);

      // S q^T, by columns
      float out[ROWS / 8][4];
      unsigned st[N / 16][4];
#pragma unroll
      for (int k = 0; k < N / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* from = &S[2 * k + e / 2][e % 2 * 2];
          st[k][e] = Two::pack(from[0], from[1]);
        }
      start();
#pragma unroll
      for (int k = 0; k < N / 16; ++k)
        k ? Product<T, ROWS>::template held<kAcross>(out, st[k], in.q.descriptor(0, k * 16))
          : Product<T, ROWS>::template held<kAcross, 0>(out, st[k], in.q.descriptor(0, 0));
      finish();
      if (a.save && chunk % every == 0) {
        T* to = at<T>(a.saved) + (((span + chunk / every) * H + h) * all_p + p_first + p[0]) * N + col;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (p[e] < width) *reinterpret_cast<unsigned*>(to + 8 * e * N + 8 * j) = st[j / 2][j % 2 * 2 + e];
      }
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        float grow[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) grow[e] = exp_(decays.L[tb * 16 + e / 2 * 8 + col + e % 2]);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 8; ++e) out[(r * TB + tb) * 2 + e / 4][e % 4] *= grow[e / 4 * 2 + e % 2];
      }
      // scores, by rows
#pragma unroll
      for (int half = 0; half < NB / 4; ++half) {
        float m[ROWS / 8][4];
        start();
#pragma unroll
        for (int k = 0; k < N / 16; ++k)
          k ? Product<T, ROWS>::template shared<kAcross>(m, in.q.descriptor(half * 64, k * 16), in.k.descriptor(0, k * 16))
            : Product<T, ROWS>::template shared<kAcross, 0>(m, in.q.descriptor(half * 64, 0), in.k.descriptor(0, 0));
        finish();
        const int b = half * 4 + warp, tb = b % TB;
        const float l[2] = {decays.L[tb * 16 + row], decays.L[tb * 16 + row + 8]};
#pragma unroll
        for (int tc = 0; tc < TB; ++tc) {
          float mix[2][4] = {};
          if (tc <= tb)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int c = n * 8 + col + e % 2, d = row + e / 2 * 8 + (tb - tc) * 16 - c, from = tc * 16 + c;
                const float below = exp_(l[e / 2] - decays.L[from]) * decays.w[from];
                mix[n][e] = d > 0 ? below : d == 0 ? own_weight(decays, from) : 0.f;
              }
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float(&x)[4] = m[(r * TB + tc) * 2 + n];
                s.scores.put(b * 16 + row + 8 * e, (r * TB + tc) * 16 + n * 8 + col,
                             Two::pack(x[2 * e] * mix[n][2 * e], x[2 * e + 1] * mix[n][2 * e + 1]));
              }
        }
      }
      publish();
      wait_copies();
      wait_at(kScores, 128);

      // v^T [16 columns of P, rows], and weighed for the state
      unsigned v[NB][4], weighed[NB][4];
      const float end = decays.L[CT - 1], decay = exp_(end);
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4];
        s.x.columns(xs, tb * 16, p0);
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = tb * 16 + col + e % 2 + e / 2 * 8;
          w[e] = exp_(end - decays.L[t]) * decays.w[t];
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {  // of xs: column p[e / 2], tokens e % 2 * 8 on
            float2 f = Two::unpack(xs[e]);
            if (Sh::kRanks) f.x *= parameter(s.parameters.psi, r, e / 2), f.y *= parameter(s.parameters.psi, r, e / 2);
            v[r * TB + tb][e / 2 + e % 2 * 2] = Sh::kRanks ? Two::pack(f.x, f.y) : xs[e];
            weighed[r * TB + tb][e / 2 + e % 2 * 2] = Two::pack(f.x * w[e % 2 * 2], f.y * w[e % 2 * 2 + 1]);
          }
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[j][e] *= decay;
      start();
#pragma unroll
      for (int c = 0; c < NB; ++c) Product<T, ROWS>::template held<kAcross>(out, v[c], s.scores.descriptor(0, c * 16));
      constexpr int kWide = N < 64 ? N : 64;
#pragma unroll
      for (int c = 0; c < NB; ++c)
#pragma unroll
        for (int n = 0; n < N; n += kWide)
          Product<T, kWide>::template held<kAlong>(
              reinterpret_cast<float(&)[kWide / 8][4]>(S[n / 8]), weighed[c], in.k.descriptor(c * 16, n));
      finish();
      arrive_at(kEmpty + chunk % kStages, 256);

      // gates, and the sum over ranks; y leaves through x's place
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4], zs[4] = {}, ys[4];
        s.x.columns(xs, tb * 16, p0);
        if (gated) s.z.columns(zs, tb * 16, p0);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 xt = Two::unpack(xs[e]), zt = Two::unpack(zs[e]);
          float2 sum = {0.f, 0.f};
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float* o = &out[(r * TB + tb) * 2 + e % 2][e / 2 * 2];
            const float through = s.parameters.skip[p[e / 2]] * parameter(s.parameters.psi, r, e / 2);
            float2 scale = {parameter(s.parameters.phi, r, e / 2), parameter(s.parameters.phi, r, e / 2)};
            scale.x *= silu(zt.x * parameter(s.parameters.zeta, r, e / 2), gated), scale.y *= silu(zt.y * parameter(s.parameters.zeta, r, e / 2), gated);
            sum.x += (o[0] + through * xt.x) * scale.x, sum.y += (o[1] + through * xt.y) * scale.y;
          }
          ys[e] = Two::pack(sum.x, sum.y);
        }
        s.x.put_columns(ys, tb * 16, p0);
      }
      __syncwarp();
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        const int t = tb * 16 + lane / 2, c = p0 + lane % 2 * 8;
        if (chunk * CT + t < seq.length && c < width)
          put16(y + (long long)(chunk * CT) * y_s + t * y_s + c, get16(s.x.unit(t, c)));
      }
      if (chunk + 1 < chunks) {
        __syncwarp();
        copy(chunk + 1);
      }
    }

#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (p[e] < width)
          *reinterpret_cast<float2*>(at<float>(a.final) + state + 8 * e * N + 8 * j) = {S[j][2 * e], S[j][2 * e + 1]};
    if (Sh::kTurns && chunks) {
      const auto& in = s.stage[(chunks - 1) % kStages];
      const int last = (seq.length - 1) % CT;
      if (p_first == 0) {
        for (int i = threadIdx.x; i < R * N; i += 128) {
          const float2 f = Two::unpack(in.k.pair((i / N * TB + last / 16) * 16 + last % 16, i % N / 2 * 2));
          at<float>(a.final_k)[unit * R * N + i] = i % 2 ? f.y : f.x;
        }
      }
      const T* x_last = x + (seq.length - 1) * a.x_s;
      for (int i = threadIdx.x; i < R * P; i += 128) {
        const int r = i / P, c = i % P;
        if (c >= width) continue;
        const float2 f = Two::unpack(*reinterpret_cast<const unsigned*>(x_last + c / 2 * 2));
        at<float>(a.final_v)[(unit * R + r) * all_p + p_first + c] = (c % 2 ? f.y : f.x) * (Sh::kRanks ? s.parameters.psi[r][c] : 1.f);
      }
    }
  }
}

}  // namespace nam56r::ssd
