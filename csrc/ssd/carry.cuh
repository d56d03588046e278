// The state's gradient, backward in time: G = dL/dS at the end of every span, one block of two warpgroups a sequence and unit.
//
//   G <- e^(L_end) G + (e^L dy)^T q,  dy_r = dy * phi_r * silu(z * zeta_r)
// Also energy = <S, G> before every span: the log decays' gradients start from it, so that no sum runs over more than a
// span. As in the forward, one warpgroup makes q, a chunk ahead, and a warp of the other has 16 of the P columns, its part
// of G [16, N] in registers, which wgmma adds to.
// Bound: issue slots; turning on the one side, gates on the other.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct CarryShared {
  Tile<Sh::ROWS, Sh::N> q[2];
  Tile<Sh::CT, P> dy, z;
  Decays<Sh> decays[2];
  Turns<Sh> turns;
  Biases<Sh> biases;
  Parameters<Sh> parameters;
  float sums[4];
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(256, N > 128 || R > 4 ? 1 : 2) carry(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  using Angle = Angles<Sh, 1>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NB = Sh::NB, NA = Sh::NA;
  constexpr bool kMoves = N <= 128 && R <= 4;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<CarryShared<Sh>*>(bytes);

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
    const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
    const float* angles = at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h;
    const float* steps = at<const float>(a.DT) + tokens;
    Angle angle;
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      auto& q = s.q[chunk % 2];
      const int t = chunk * CT, live = seq.length - t;
      if (chunk + 2 < chunks) wait_at(kEmpty + chunk % 2, 256);
      copy_rows<Sh, 4>(q, C + t * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_decays<Sh>(s.decays[chunk % 2], a, tokens + t, live);
      commit();
      if constexpr (Sh::kTurns) {
        angle.load(angles + t * a.a_s, int(a.a_s), live);
        const float base = at<const float>(a.bases)[((span * every + chunk) * H + h) * NA + Angle::index()];
        wait_at(kTurning, 128);  // the chunk before is turned
        angle.turn(s.turns, base, steps + t, live);
      }
      wait_copies();
      wait_at(kTurning, 128);
      turn_rows<Sh, 4>(q, nullptr, s.biases, s.turns);
      publish();
      arrive_at(kFull + chunk % 2, 256);
    }
  } else {
    if constexpr (kMoves) take_registers();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
    const T* dy = at<const T>(a.dy) + seq.row * a.dy_b + seq.first * a.dy_s + h * a.dy_h + p_first;
    const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
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

    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };
    const auto copy = [&](int chunk) {  // what only this warp reads
      const int t = chunk * CT, live = seq.length - t;
      copy_columns<Sh>(s.dy, dy + t * a.dy_s, int(a.dy_s), live, p0, width);
      if (gated) copy_columns<Sh>(s.z, z + t * a.z_s, int(a.z_s), live, p0, width);
      commit();
    };

    if (chunks) copy(chunks - 1);
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const auto& q = s.q[chunk % 2];
      const auto& decays = s.decays[chunk % 2];
      wait_at(kFull + chunk % 2, 256);
      wait_copies();
      __syncwarp();
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
        s.dy.columns(dys, tb * 16, p0);
        if (gated) s.z.columns(zs, tb * 16, p0);
        float grow[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) grow[e] = exp_(decays.L[tb * 16 + col + e % 2 + e / 2 * 8]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 d = Two::unpack(dys[e]), zt = Two::unpack(zs[e]);
          const float2 grown = {d.x * grow[e % 2 * 2], d.y * grow[e % 2 * 2 + 1]};
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float2 scale = {parameter(s.parameters.phi, r, e / 2), parameter(s.parameters.phi, r, e / 2)};
            scale.x *= silu(zt.x * parameter(s.parameters.zeta, r, e / 2), gated), scale.y *= silu(zt.y * parameter(s.parameters.zeta, r, e / 2), gated);
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
              reinterpret_cast<float(&)[kWide / 8][4]>(G[n / 8]), weighed[c], q.descriptor(c * 16, n));
      finish();
      arrive_at(kEmpty + chunk % 2, 256);
      __syncwarp();
      if (chunk) copy(chunk - 1);
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
      if (chunk % every == 0) {
        wait_at(kScores, 128);
        if (threadIdx.x == 0)
          at<float>(a.energy)[(span + chunk / every) * gridDim.x + blockIdx.x] = s.sums[0] + s.sums[1] + s.sums[2] + s.sums[3];
        wait_at(kScores, 128);
      }
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (p[e] < width)
          *reinterpret_cast<float2*>(at<float>(a.dstate) + state + 8 * e * N + 8 * j) = {G[j][2 * e], G[j][2 * e + 1]};
  }
}

}  // namespace nam56r::ssd
