// The state's gradient, backward in time: G = dL/dS at the end of every span, one block (a warpgroup) a sequence and unit.
//
//   G <- e^(L_end) G + (e^L dy)^T q,  dy_r = dy * phi_r * silu(z * zeta_r)
// Also energy = <S, G> before every span: the log decays' gradients start from it, so that no sum runs over more than a
// span. As in the forward, a warp has 16 of the P columns, its part of G [16, N] in registers, which wgmma adds to.
// Bound: issue slots; turning and gates are most instructions.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct CarryShared {
  struct Stage {
    Tile<Sh::ROWS, Sh::N> q;
    Tile<Sh::CT, P> dy, z;
  };
  Stage stage[2];
  Decays<Sh> decays[2];
  Turns<Sh> turns;
  Biases<Sh> biases;
  Parameters<Sh> parameters;
  float sums[4];
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(128, N > 128 || R > 4 ? 1 : 2) carry(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA, THREADS = 128;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<CarryShared<Sh>*>(bytes);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
  const int H = int(a.H), all_p = int(a.P), every = int(a.every), blocks = gridDim.x / H;
  const int h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, width = min(P, all_p), g = h / int(a.heads_per_group);
  const Sequence seq = sequence(a, blockIdx.y);
  const int chunks = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * H + h, tokens = h * a.tokens + seq.token;
  const T* dy = at<const T>(a.dy) + seq.row * a.dy_b + seq.first * a.dy_s + h * a.dy_h + p_first;
  const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
  const float* angles = at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h;
  const float* steps = at<const float>(a.DT) + tokens;
  const long long span = first_span(a, blockIdx.y);
  const bool gated = a.z;

  const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
  const long long state = (unit * all_p + p_first + p[0]) * N + col;
  float G[N / 8][4] = {};
  if (a.dfinal)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (p[e] < width) {
          const float2 v = *reinterpret_cast<const float2*>(at<const float>(a.dfinal) + state + 8 * e * N + 8 * j);
          G[j][2 * e] = v.x, G[j][2 * e + 1] = v.y;
        }

  const auto copy = [&](int chunk) {
    auto& to = s.stage[chunk % 2];
    const int t = chunk * CT, live = seq.length - t;
    copy_rows<Sh, 4>(to.q, C + t * a.C_s, int(a.C_s), int(a.C_r), live);
    copy_tokens<Sh, THREADS>(to.dy, dy + t * a.dy_s, int(a.dy_s), live, width);
    if (gated) copy_tokens<Sh, THREADS>(to.z, z + t * a.z_s, int(a.z_s), live, width);
    copy_decays<Sh>(s.decays[chunk % 2], a, tokens + t, live);
    commit();
  };
  Angles<Sh> angle;
  float base = 0.f;
  const auto load_angles = [&](int chunk) {
    if (!Angles<Sh>::mine()) return;
    angle.load(angles + chunk * CT * a.a_s, int(a.a_s), seq.length - chunk * CT);
    base = at<const float>(a.bases)[((span * every + chunk) * H + h) * NA + Angles<Sh>::index()];
  };
  const auto turns = [&](int chunk) { angle.turn(s.turns, base, steps + chunk * CT, seq.length - chunk * CT); };
  const auto turn = [&](int chunk) {
    turn_rows<Sh, 4>(s.stage[chunk % 2].q, nullptr, s.biases, s.turns);
    publish();
  };

  if (chunks) {
    copy_biases<Sh, THREADS>(s.biases, a, h);
    copy_parameters<Sh, THREADS>(s.parameters, a, h, p_first, width);
    copy(chunks - 1);
    if (Sh::kTurns) load_angles(chunks - 1), turns(chunks - 1);
    wait_copies();
    __syncthreads();
    turn(chunks - 1);
  }
  float zeta[R][2], phi[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      zeta[r][e] = Sh::kRanks ? s.parameters.zeta[r][p[e]] : 1.f;
      phi[r][e] = Sh::kRanks ? s.parameters.phi[r][p[e]] : 1.f;
    }
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const auto& in = s.stage[chunk % 2];
    const auto& decays = s.decays[chunk % 2];
    __syncthreads();  // q of this chunk is turned; the other stage and the angles are free
    if (chunk) {
      copy(chunk - 1);
      if (Sh::kTurns) load_angles(chunk - 1);
    }
    const long long of_span = (((span + chunk / every) * H + h) * all_p + p_first + p[0]) * N + col;
    if (chunk == chunks - 1 || chunk % every == every - 1) {
      T* to = at<T>(a.carried) + of_span;
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (p[e] < width)
            *reinterpret_cast<unsigned*>(to + 8 * e * N + 8 * j) = Two::pack(G[j][2 * e], G[j][2 * e + 1]);
    }
    unsigned weighed[NB][4];
#pragma unroll
    for (int tb = 0; tb < TB; ++tb) {
      unsigned dys[4], zs[4] = {};
      in.dy.columns(dys, tb * 16, p0);
      if (gated) in.z.columns(zs, tb * 16, p0);
      float grow[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) grow[e] = exp_(decays.L[tb * 16 + col + e % 2 + e / 2 * 8]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 d = Two::unpack(dys[e]), zt = Two::unpack(zs[e]);
        const float2 grown = {d.x * grow[e % 2 * 2], d.y * grow[e % 2 * 2 + 1]};
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float2 scale = {phi[r][e / 2], phi[r][e / 2]};
          scale.x *= silu(zt.x * zeta[r][e / 2], gated), scale.y *= silu(zt.y * zeta[r][e / 2], gated);
          weighed[r * TB + tb][e / 2 + e % 2 * 2] = Two::pack(grown.x * scale.x, grown.y * scale.y);
        }
      }
    }
    const float decay = exp_(decays.L[CT - 1]);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) G[j][e] *= decay;
    constexpr int kWide = N < 64 ? N : 64;
    start();
#pragma unroll
    for (int c = 0; c < NB; ++c)
#pragma unroll
      for (int n = 0; n < N; n += kWide)
        Product<T, kWide>::template held<kAlong>(
            reinterpret_cast<float(&)[kWide / 8][4]>(G[n / 8]), weighed[c], in.q.descriptor(c * 16, n));
    finish();
    if (chunk && Sh::kTurns) turns(chunk - 1);
    if (chunk % every == 0) {
      float sum = 0.f;
      const T* S = at<const T>(a.saved) + of_span;
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (p[e] < width) {
            const float2 f = Two::unpack(*reinterpret_cast<const unsigned*>(S + 8 * e * N + 8 * j));
            sum += f.x * G[j][2 * e] + f.y * G[j][2 * e + 1];
          }
#pragma unroll
      for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) s.sums[warp] = sum;
    }
    if (chunk) wait_copies();
    __syncthreads();
    if (chunk % every == 0 && threadIdx.x == 0)
      at<float>(a.energy)[(span + chunk / every) * gridDim.x + blockIdx.x] = s.sums[0] + s.sums[1] + s.sums[2] + s.sums[3];
    if (chunk) turn(chunk - 1);
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (p[e] < width)
        *reinterpret_cast<float2*>(at<float>(a.dstate) + state + 8 * e * N + 8 * j) = {G[j][2 * e], G[j][2 * e + 1]};
}

}  // namespace nam56r::ssd
