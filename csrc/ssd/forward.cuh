// The forward scan: y and the final state, one block of two warpgroups a sequence and unit (head, or 64 columns of one).
//
// With L_t the log decay summed since the chunk's start, and mix_ts = e^(L_t - L_s) w_s for s < t, own_t for s = t:
//   scores = q k^T   y^T = v^T (mix * scores)^T + e^L (S q^T) + D v^T   S <- e^(L_end) S + (e^(L_end - L) w v)^T k
// One warpgroup makes q and k, a chunk ahead: fetches B, C, x and z by TMA, adds the biases, turns. The other has all four
// products. y is made transposed, [P, rows], so that S [P, N], which stays in registers in fp32, is, rounded, the A operand
// of S q^T as it lies there, and so that a thread has all ranks of its tokens: the sum over ranks is its own. With four ranks
// there are registers enough for work while products run: decays while the scores are made, gates while the state is.
// Shared memory: q and k, twice where two blocks then still fit an SM; x, z, which y leaves through; the scores; the turns.
// Bound: latency: turning on the one side (busy 90 %), decays and gates on the other (87 %); shared memory 75 %.
#pragma once

#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct ForwardShared {
  struct Stage {
    Tile<ROWS, Sh::N> q, k;
  };
  static constexpr int kStages = Sh::N > 128 ? 1 : 2;
  static constexpr bool kRoom = Sh::R > 1 && kStages == 2;
  static constexpr int kIn = kRoom ? 3 : 1, kTurned = kRoom ? 2 : 1;  // of x and z; of turns
  Stage stage[kStages];
  Tile<ROWS, ROWS> scores;
  struct {
    Tile<Sh::CT, P> x, z;
  } in[kIn];
  Decays<Sh> decays[kStages];
  Turns<Sh> turns[kTurned];
  Parameters<Sh> parameters;
  struct Gate {  // phi silu(z zeta) is open + z height / (1 + 2^(z steep)); D psi
    float open, height, steep, through;
  };
  alignas(16) Gate gates[Sh::R][P];
  Arrival arrived[kStages], came[kIn];  // q and k; x and z
  struct {  // where the sequence lies; not in registers, of which there are too few
    long long row, first;
    int group, head, column;
    typename Sh::T* y;
    const float *angles, *decays;
    float* bases;
    int length, apart;  // of the sequence; between L, w, own and dt, H tokens
  } where;
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(256, N > 128 ? 1 : 2) forward(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  using Row = Rows<Sh, 2>;
  constexpr int CT = Sh::CT, TB = Sh::TB, NA = Sh::NA, EIGHTS = Sh::EIGHTS;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<ForwardShared<Sh>*>(bytes);
  constexpr int kStages = ForwardShared<Sh>::kStages, kIn = ForwardShared<Sh>::kIn, kTurned = ForwardShared<Sh>::kTurned;

  const int H = int(a.H), all_p = int(a.P), every = int(a.every), blocks = gridDim.x / H;
  const int h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, width = min(P, all_p);
  const Sequence seq = sequence(a, blockIdx.y);
  const int chunks = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * H + h, tokens = h * a.tokens + seq.token;
  const long long span = first_span(a, blockIdx.y), numbered = a.cu ? span : 0;  // in segments, sequences of a batch start anew

  copy_parameters<Sh, 256>(s.parameters, a, h, p_first, width);
  if (threadIdx.x == 0)
    s.where = {seq.row, seq.first, h / int(a.heads_per_group), h, p_first,
            at<T>(a.y) + ((seq.row * a.S + seq.first) * H + h) * all_p + p_first,
            at<const float>(a.angles) + seq.row * a.a_b + seq.first * a.a_s + h * a.a_h,
            at<const float>(a.L) + tokens,
            at<float>(a.bases) + (span * every * H + h) * NA,
            seq.length, int(a.H * a.tokens)};
  const auto& here = s.where;
  if (threadIdx.x < kStages) s.arrived[threadIdx.x].make(2);
  if (threadIdx.x < kIn) s.came[threadIdx.x].make(a.z ? 2 : 1);
  publish();
  commit();
  wait_copies();
  __syncthreads();
  if constexpr (Sh::kRanks) {
    for (int i = threadIdx.x; i < R * P; i += 256) {
      const int r = i / P, c = i % P;
      const float phi = s.parameters.phi[r][c], zeta = s.parameters.zeta[r][c];
      s.gates[r][c] = {a.z ? 0.f : phi, phi * zeta, -LOG2_E * zeta, s.parameters.skip[c] * s.parameters.psi[r][c]};
    }
    __syncthreads();
  }

  // What a chunk needs, each of the four fetched by one thread.
  const auto fetch = [&](int chunk, auto& tile, const TensorMap& map) {
    fetch_rows<Sh>(s.arrived[chunk % kStages], tile, map, here.group, int(here.first) + chunk * CT, int(here.row));
  };
  const auto fetch_in = [&](int chunk, auto& tile, const TensorMap& map) {
    auto& came = s.came[chunk % kIn];
    came.expect(sizeof(tile));
    came.copy_box(&tile, &map, here.column, here.head, int(here.first) + chunk * CT, int(here.row));
  };

  if (threadIdx.x >= 128) {
    if constexpr (N <= 128) give_registers<Sh::kTurns ? 88 : 64>();
    const Row row;
    typename Row::Bias bias;
    Angles<Sh> angle;
    float base = 0.f;
    const auto load = [&](int chunk) {
      const float* steps = here.decays + 3 * here.apart;
      angle.load(here.angles + (long long)chunk * CT * a.a_s, int(a.a_s), steps + chunk * CT, here.length - chunk * CT);
    };
    if constexpr (Sh::kTurns) {
      row.load(bias, at<const float>(row.tile ? a.B_bias : a.C_bias) + (long long)h * R * N);
      if (a.angle && Angles<Sh>::mine())
        base = fraction(at<const float>(a.angle)[unit * NA + Angles<Sh>::index()] * 0.15915494309189535f);
      load(0);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      auto& stage = s.stage[chunk % kStages];
      auto& tile = row.tile ? stage.k : stage.q;
      auto& turns = s.turns[chunk % kTurned];
      const int t = chunk * CT, live = here.length - t;
      if (chunk >= kStages) wait_at(kEmpty + chunk % kStages, 256);
      auto& arrived = s.arrived[chunk % kStages];
      auto& in = s.in[chunk % kIn];  // where that of kIn chunks before was, of which y has left
      if (threadIdx.x == 128) fetch(chunk, stage.q, maps.C);
      if (threadIdx.x == 160) fetch(chunk, stage.k, maps.B);
      if (kIn > 1 && threadIdx.x == 192) fetch_in(chunk, in.x, maps.x);
      if (kIn > 1 && threadIdx.x == 224 && a.z) fetch_in(chunk, in.z, maps.z);
      copy_decays<Sh>(s.decays[chunk % kStages], here.decays + t, here.apart, live);
      commit();
      if constexpr (Sh::kTurns) {
        if (a.save && Angles<Sh>::mine() && threadIdx.x % Angles<Sh>::SEG == 0 && p_first == 0)
          here.bases[(long long)chunk * H * NA + Angles<Sh>::index()] = base;
        if (kTurned == 1) wait_at(kTurning, 128);  // the chunk before is turned
        base = fraction(base + angle.turn(turns, base));
        if (chunk + 1 < chunks) load(chunk + 1);
      }
      wait_copies();
      arrived.wait(chunk / kStages % 2);
      if (live < CT) clear_rows<Sh>(stage.q, live), clear_rows<Sh>(stage.k, live);
      wait_at(kTurning, 128);
      row.template turn<Row::ITEMS>(tile, tile, bias, turns);
      publish();
      arrive_at(kFull + chunk % kStages, 256);
    }
    if (Sh::kTurns && chunks && p_first == 0 && Angles<Sh>::mine() && threadIdx.x % Angles<Sh>::SEG == 0)
      at<float>(a.final_angle)[unit * NA + Angles<Sh>::index()] = base * 6.283185307179586f;
  } else {
    if constexpr (N <= 128) take_registers<Sh::kTurns ? 168 : 192>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
    const int y_s = H * all_p;
    const bool gated = a.z;
    const float plain = gated ? 0.f : 1.f;
    constexpr bool kMeanwhile = R > 2;  // at lower ranks the registers are too few

    // the thread's columns of P: p[0] and p[1]
    const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
    const long long state = (unit * all_p + p_first + p[0]) * N + col;
    float S[N / 8][4] = {};
    if (a.state) load_state(S, at<const float>(a.state) + state, p, width);
    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };
    const auto fetch_alone = [&](int chunk) {
      if (threadIdx.x == 0) fetch_in(chunk, s.in[0].x, maps.x);
      if (threadIdx.x == 32 && gated) fetch_in(chunk, s.in[0].z, maps.z);
    };
    if (kIn == 1 && chunks) fetch_alone(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const auto& in = s.stage[chunk % kStages];
      const auto& decays = s.decays[chunk % kStages];
      auto &x = s.in[chunk % kIn].x, &z = s.in[chunk % kIn].z;
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
          : Product<T, ROWS>::template held_first<kAcross>(out, st[k], in.q.descriptor(0, 0));
      finish();
      const float end = decays.L()[CT - 1], decay = exp_(end);
      const auto age = [&] {  // S is kept where a segment starts; then it and y take their decays
        if (a.save && chunk % every == 0 && (chunk == 0 || (numbered + chunk / every) % a.segment_spans == 0)) {
          const long long part = (numbered + chunk / every) / a.segment_spans + (a.cu ? blockIdx.y : blockIdx.y * a.segments);
          store_state(at<float>(a.saved) + ((part * H + h) * all_p + p_first + p[0]) * N + col, S, p, width);
        }
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          const float2 L = *reinterpret_cast<const float2*>(&decays.L()[i * 8 + col]), grow = {exp_(L.x), exp_(L.y)};
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[r * EIGHTS + i][e] *= e % 2 ? grow.y : grow.x;
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) S[j][e] *= decay;
      };
      if (!kMeanwhile) age();
      // scores, by rows
      {
        float m[ROWS / 8][4];
        start();
        across<T, N>(m, in.q, in.k);
        close();
        if (kMeanwhile) age();
        settle();
        if (kIn > 1) wait_at(kProducts, 128);  // the scores before are read
        const int mine[2] = {p[0] % CT, p[1] % CT};  // the rows' tokens
        int at_row = p[0];
        if (!kMeanwhile) asm volatile("" : "+r"(at_row));  // or addresses are made ahead, and spilled
        const float l[2] = {decays.L()[mine[0]], decays.L()[mine[1]]}, own[2] = {own_weight(decays, mine[0]), own_weight(decays, mine[1])};
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          const float2 L = *reinterpret_cast<const float2*>(&decays.L()[i * 8 + col]);
          const float2 w = *reinterpret_cast<const float2*>(&decays.w()[i * 8 + col]);
          float mix[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int later = mine[e / 2] - i * 8 - col - e % 2;
            const float below = exp_(l[e / 2] - (e % 2 ? L.y : L.x)) * (e % 2 ? w.y : w.x);
            mix[e] = later > 0 ? below : later == 0 ? own[e / 2] : 0.f;
          }
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float(&x)[4] = m[r * EIGHTS + i];
              s.scores.put(at_row + 8 * e, (r * EIGHTS + i) * 8 + col, Two::pack(x[2 * e] * mix[2 * e], x[2 * e + 1] * mix[2 * e + 1]));
            }
        }
      }
      publish();
      wait_at(kProducts, 128);
      s.came[chunk % kIn].wait(chunk / kIn % 2);
      if (here.length - chunk * CT < CT) clear_columns<Sh>(x, z, p0, here.length - chunk * CT);

      // v^T [16 columns of P, rows], and weighed for the state
      unsigned v[4][4], weighed[4][4];
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4];
        x.columns(xs, tb * 16, p0);
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = (tb * 16 + e / 2 * 8) % CT + col + e % 2;
          w[e] = exp_(end - decays.L()[t]) * decays.w()[t];
        }
#pragma unroll
        for (int b = tb; b < 4; b += TB)
#pragma unroll
          for (int e = 0; e < 4; ++e) {  // of xs: column p[e / 2], tokens e % 2 * 8 on
            const int r = Sh::rank(2 * b + e % 2);
            float2 f = Two::unpack(xs[e]);
            if (Sh::kRanks) f.x *= parameter(s.parameters.psi, r, e / 2), f.y *= parameter(s.parameters.psi, r, e / 2);
            v[b][e / 2 + e % 2 * 2] = Sh::kRanks ? Two::pack(f.x, f.y) : xs[e];
            weighed[b][e / 2 + e % 2 * 2] = Two::pack(f.x * w[e % 2 * 2], f.y * w[e % 2 * 2 + 1]);
          }
      }
      start();
#pragma unroll
      for (int c = 0; c < 4; ++c) Product<T, ROWS>::template held<kAcross>(out, v[c], s.scores.descriptor(0, c * 16));
      close();
      constexpr int kWide = N < 64 ? N : 64;
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int n = 0; n < N; n += kWide)
          Product<T, kWide>::template held<kAlong>(
              reinterpret_cast<float(&)[kWide / 8][4]>(S[n / 8]), weighed[c], in.k.descriptor(c * 16, n));
      close();
      const auto leave = [&] {
        settle();
        keep(weighed);
        arrive_at(kEmpty + chunk % kStages, 256);
      };
      settle<kMeanwhile>();
      keep(v);
      if (!kMeanwhile) leave();

      // gates, and the sum over ranks, while the state's product runs; y leaves through x's place
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4], zs[4] = {}, ys[4];
        x.columns(xs, tb * 16, p0);
        if (gated) z.columns(zs, tb * 16, p0);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 xt = Two::unpack(xs[e]), zt = Two::unpack(zs[e]);
          float2 sum = {0.f, 0.f};
          const auto add = [&](int b, int half) {  // the tokens of that half of the block
            const int r = Sh::rank(2 * b + half);
            const float* o = &out[2 * b + half][e / 2 * 2];
            float4 gate = {plain, 1.f, -LOG2_E, s.parameters.skip[p[e / 2]]};
            if constexpr (Sh::kRanks) gate = *reinterpret_cast<const float4*>(&s.gates[r][p[e / 2]]);
            sum.x += (o[0] + gate.w * xt.x) * (gate.x + zt.x * gate.y * reciprocal(1.f + exp2_(zt.x * gate.z)));
            sum.y += (o[1] + gate.w * xt.y) * (gate.x + zt.y * gate.y * reciprocal(1.f + exp2_(zt.y * gate.z)));
          };
#pragma unroll
          for (int b = tb; b < 4; b += TB) {
            add(b, e % 2);
            if (CT < 16) add(b, 1 - e % 2);
          }
          ys[e] = Two::pack(sum.x, sum.y);
        }
        x.put_columns(ys, tb * 16, p0);
        if (kMeanwhile && tb == 0) leave();
      }
      store_columns<Sh>(here.y + (long long)(chunk * CT) * y_s, y_s, x, p0, here.length - chunk * CT, width);
      if (kIn == 1 && chunk + 1 < chunks) {
        publish();
        wait_at(kProducts, 128);  // all have stored y
        fetch_alone(chunk + 1);
      }
    }

    store_state(at<float>(a.final) + state, S, p, width);
    if (Sh::kTurns && chunks) {
      const auto& in = s.stage[(chunks - 1) % kStages];
      const int last = (seq.length - 1) % CT;
      if (p_first == 0) {
        for (int i = threadIdx.x; i < R * N; i += 128) {
          const float2 f = Two::unpack(in.k.pair(i / N * CT + last, i % N / 2 * 2));
          at<float>(a.final_k)[unit * R * N + i] = i % 2 ? f.y : f.x;
        }
      }
      const T* x_last = at<const T>(a.x) + seq.row * a.x_b + (seq.first + seq.length - 1) * a.x_s + h * a.x_h + p_first;
      for (int i = threadIdx.x; i < R * P; i += 128) {
        const int r = i / P, c = i % P;
        if (c >= width) continue;
        const float2 f = Two::unpack(*reinterpret_cast<const unsigned*>(x_last + c / 2 * 2));
        at<float>(a.final_v)[(unit * R + r) * all_p + p_first + c] = (c % 2 ? f.y : f.x) * (Sh::kRanks ? s.parameters.psi[r][c] : 1.f);
      }
    }
  }
#endif
}

}  // namespace nam56r::ssd
