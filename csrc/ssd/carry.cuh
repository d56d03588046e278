// The state's gradient, backward in time: G = dL/dS at the end of every span, one block of 4 warps a sequence and unit.
//
//   G <- e^(L_end) G + (e^L dy)^T q,  dy_r = dy * phi_r * silu(z * zeta_r)
// Also energy = <S, G> before every span: the log decays' gradients start from it, so that no sum runs over more than a
// span. Tiles as in the forward: a warp has 16 of the P columns, its part of G [16, N] in registers.
// Bound: issue slots, as the forward's state is; a chunk is 64 mma a warp.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct CarryShared {
  struct Stage {
    Tile<Sh::ROWS, Sh::N> q;
    Tile<Sh::CT, Sh::P> dy, z;
    Decays<Sh> decays;
  };
  Stage stage[2];
  Turns<Sh> turns;
  Biases<Sh> biases;
  float sums[4];
};

template <typename T, int MODEL, int R, int P, int N>
__global__ void __launch_bounds__(128, 2) carry(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, P, N>;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NA = Sh::NA, THREADS = 128;
  extern __shared__ char bytes[];
  auto& s = *reinterpret_cast<CarryShared<Sh>*>(bytes);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
  const int H = int(a.H), blocks = gridDim.x / H, h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, g = h / int(a.heads_per_group);
  const int all_p = P * blocks, every = int(a.every);
  const Sequence seq = sequence(a, blockIdx.y);
  const int chunks = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * H + h, tokens = h * a.tokens + seq.token;
  const T* dy = at<const T>(a.dy) + seq.row * a.dy_b + seq.first * a.dy_s + h * a.dy_h + p_first;
  const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + g * a.C_g;
  const float* angles = at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h;
  const float* steps = at<const float>(a.DT) + tokens;
  const long long span = first_span(a, blockIdx.y);

  const int p0 = warp * 16;
  const bool active = p0 < P;
  float zeta[R][2], phi[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int from = (h * R + r) * all_p + p_first + p0 + row + 8 * e;
      zeta[r][e] = Sh::kRanks && active && a.z ? at<const float>(a.zeta)[from] : 1.f;
      phi[r][e] = Sh::kRanks && active ? at<const float>(a.phi)[from] : 1.f;
    }

  float G[N / 8][4] = {};
  const long long state = (unit * all_p + p_first + p0 + row) * N + col;
  if (a.dfinal && active)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 v = *reinterpret_cast<const float2*>(at<const float>(a.dfinal) + state + 8 * e * N + 8 * j);
        G[j][2 * e] = v.x, G[j][2 * e + 1] = v.y;
      }

  const auto copy = [&](int chunk) {
    auto& to = s.stage[chunk % 2];
    const int t = chunk * CT, live = seq.length - t;
    copy_rows<Sh, 4>(to.q, C + t * a.C_s, int(a.C_s), int(a.C_r), live);
    copy_tokens<Sh, THREADS>(to.dy, dy + t * a.dy_s, int(a.dy_s), live);
    if (a.z) copy_tokens<Sh, THREADS>(to.z, z + t * a.z_s, int(a.z_s), live);
    copy_decays<Sh>(to.decays, a, tokens + t, live);
    commit();
  };
  Angles<Sh> angle;
  float base = 0.f;
  const auto load_angles = [&](int chunk) {
    if (!Angles<Sh>::mine()) return;
    angle.load(angles + chunk * CT * a.a_s, int(a.a_s), steps + chunk * CT, seq.length - chunk * CT);
    base = at<const float>(a.bases)[((span * every + chunk) * H + h) * NA + Angles<Sh>::index()];
  };

  if (chunks) {
    copy_biases<Sh, THREADS>(s.biases, a, h);
    copy(chunks - 1);
    if (Sh::kTurns) load_angles(chunks - 1), angle.turn(s.turns, base);
    wait_copies();
    __syncthreads();
    turn_rows<Sh, 4>(s.stage[(chunks - 1) % 2].q, nullptr, s.biases, s.turns);
  }
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    auto& in = s.stage[chunk % 2];
    __syncthreads();
    if (chunk) {
      copy(chunk - 1);
      if (Sh::kTurns) load_angles(chunk - 1);
    }
    const long long at_span = (span + chunk / every) * H + h, of_span = (at_span * all_p + p_first + p0 + row) * N + col;
    if (active) {
      if (chunk == chunks - 1 || chunk % every == every - 1) {
        T* to = at<T>(a.carried) + of_span;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            *reinterpret_cast<unsigned*>(to + 8 * e * N + 8 * j) = Two::pack(G[j][2 * e], G[j][2 * e + 1]);
      }
      const float decay = exp_(in.decays.L[CT - 1]);
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) G[j][e] *= decay;
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned dyt[4], zt[4] = {};
        in.dy.b_t(dyt, tb * 16, p0);
        if (a.z) in.z.b_t(zt, tb * 16, p0);
        float grow[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) grow[e] = exp_(in.decays.L[tb * 16 + col + e % 2 + e / 2 * 8]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          unsigned weighed[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float2 f = Two::unpack(dyt[e]), gate = Two::unpack(zt[e]);
            const float scale = Sh::kRanks ? phi[r][e / 2] : 1.f;
            f.x *= scale * grow[e % 2 * 2], f.y *= scale * grow[e % 2 * 2 + 1];
            if (Sh::kRanks) gate.x *= zeta[r][e / 2], gate.y *= zeta[r][e / 2];
            if (a.z) f.x *= gate.x * sigmoid(gate.x), f.y *= gate.y * sigmoid(gate.y);
            weighed[e / 2 + e % 2 * 2] = Two::pack(f.x, f.y);
          }
#pragma unroll
          for (int j = 0; j < N / 16; ++j) {
            unsigned q[4];
            in.q.b_t(q, (r * TB + tb) * 16, j * 16);
            Two::mma(G[2 * j], weighed, q[0], q[1]);
            Two::mma(G[2 * j + 1], weighed, q[2], q[3]);
          }
        }
      }
    }
    if (chunk % every == 0) {
      float sum = 0.f;
      if (active) {
        const T* S = at<const T>(a.saved) + of_span;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 f = Two::unpack(*reinterpret_cast<const unsigned*>(S + 8 * e * N + 8 * j));
            sum += f.x * G[j][2 * e] + f.y * G[j][2 * e + 1];
          }
      }
#pragma unroll
      for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) s.sums[warp] = sum;
    }
    if (chunk && Sh::kTurns) angle.turn(s.turns, base);
    __syncthreads();
    if (chunk % every == 0 && threadIdx.x == 0)
      at<float>(a.energy)[(span + chunk / every) * gridDim.x + blockIdx.x] = s.sums[0] + s.sums[1] + s.sums[2] + s.sums[3];
    if (chunk) {
      wait_copies();
      turn_rows<Sh, 4>(s.stage[(chunk - 1) % 2].q, nullptr, s.biases, s.turns);
    }
  }
  if (active)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(at<float>(a.dstate) + state + 8 * e * N + 8 * j) = {G[j][2 * e], G[j][2 * e + 1]};
}

}  // namespace nam56r::ssd
