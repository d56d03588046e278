// The states before every chunk of a segment, and the gradients G of the states after every chunk.
//
//   forward in time    S <- e^(L_end) S + (e^(L_end - L) w v)^T k
//   backward           G <- e^(L_end) G + (e^L dys)^T q        v, dys: see gradient.cuh
// One block of two warpgroups a sequence, unit and direction. One fetches and makes the rows of k or q: the rows by TMA, the
// turns that `turns` has made in one piece, x, z and decays line by line, all two chunks ahead; it adds the biases and turns.
// A warp of the other has 16 of the P columns, its part of the state [16, N] in fp32 registers, which wgmma adds to, and which
// leaves, rounded, through shared memory: `states` and `carried` hold tiles as wgmma reads them. While a chunk's product runs,
// the next chunk's v or dys is weighed. The direction with the gates comes first: its blocks take longer. A segment's S starts
// from what the forward saved, G from the segment after it, in `dstate`, which stays fp32. <S, G> of a sequence's first chunk
// is summed here, where both are fp32: in a short sequence that is most of log_decay's gradient.
// Bound: latency of both, each busy 80 to 85 %; DRAM 62 %, for the states it writes are 2.1 GB a layer at the recipe's shape.
#pragma once

#include "ssd/sums.cuh"
#include "ssd/tiles.cuh"

namespace nam56r::ssd {

template <class Sh>
struct WalkShared {
  static constexpr int kStages = Sh::R == 1 ? (Sh::kTurns ? 2 : 3) : Sh::R == 2 ? 3 : 4;  // what fits twice on an SM
  static constexpr int kIn = Sh::R == 1 ? 2 : 3;
  Tile<ROWS, Sh::N> rows[kStages];
  Tile<P, Sh::N> out;
  struct {
    Tile<Sh::CT, P> x, z;  // or dy, z
    Decays<Sh, 2> decays;
  } in[kIn];
  Turns<Sh> turns[kStages];
  Parameters<Sh> parameters;
  Arrival arrived[kStages], came[kIn], weighed[kIn];  // rows and turns, x, z and decays; the latter are read
  float energy[4];
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(256, N > 128 ? 1 : 2) walk(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  using Sh = Shape<T, MODEL, R, N>;
  using Two = Pair<T>;
  using Row = Rows<Sh, 1>;
  constexpr int CT = Sh::CT, TB = Sh::TB, kStages = WalkShared<Sh>::kStages, kIn = WalkShared<Sh>::kIn, kAhead = kStages > 2 ? 2 : 1;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<WalkShared<Sh>*>(bytes);

  const bool back = blockIdx.z == 0;  // what takes longer first
  const int H = int(a.H), all_p = int(a.P), every = int(a.every), blocks = gridDim.x / H;
  const int h = blockIdx.x / blocks, p_first = blockIdx.x % blocks * P, width = min(P, all_p), g = h / int(a.heads_per_group);
  const Sequence seq = sequence(a, blockIdx.y);
  const int all = (seq.length + CT - 1) / CT;
  const long long unit = (long long)blockIdx.y * H + h, tokens = h * a.tokens + seq.token, span = first_span(a, blockIdx.y);
  // the segment's chunks of the sequence, and where they lie in it
  const long long segment = a.cu ? a.segment - span : a.segment;
  const int low = int(min((long long)all, max(0ll, segment) * every)), high = int(max(0ll, min((long long)all, (segment + a.segment_spans) * every)));
  const long long lies = a.cu ? -segment * every : (blockIdx.y * a.segment_spans - segment) * every;
  const int chunks = high - low;
  if (chunks <= 0 && !(back && all == 0 && a.segment == 0)) return;
  const bool gated = a.z && back;
  const auto chunk_of = [&](int n) { return back ? high - 1 - n : low + n; };

  copy_parameters<Sh, 256>(s.parameters, a, h, p_first, width);
  if (threadIdx.x < kStages) s.arrived[threadIdx.x].make(1 + Sh::kTurns);
  if (threadIdx.x < kIn) s.came[threadIdx.x].make(128), s.weighed[threadIdx.x].make(4);
  publish();
  commit();
  wait_copies();
  __syncthreads();

  if (threadIdx.x >= 128) {
    if constexpr (N <= 128) give_registers<96>();
    const Row row;
    typename Row::Bias bias;
    const auto copy = [&](int n) {
      if (n >= chunks) return;
      if (n >= kStages) wait_at(kEmpty + n % kStages, 256);
      auto& arrived = s.arrived[n % kStages];
      auto& rows = s.rows[n % kStages];
      if (threadIdx.x == 128)
        fetch_rows<Sh>(arrived, rows, back ? maps.C : maps.B, g, int(seq.first) + chunk_of(n) * CT, int(seq.row));
      if (Sh::kTurns && threadIdx.x == 192) {
        arrived.expect(sizeof(s.turns[0]));
        arrived.copy(&s.turns[n % kStages], at<const Turns<Sh>>(a.turns) + (lies + chunk_of(n)) * H + h, sizeof(s.turns[0]));
      }
    };
    const T* x = back ? at<const T>(a.dy) + seq.row * a.dy_b + seq.first * a.dy_s + h * a.dy_h + p_first
                      : at<const T>(a.x) + seq.row * a.x_b + seq.first * a.x_s + h * a.x_h + p_first;
    const int x_s = int(back ? a.dy_s : a.x_s);
    const T* z = at<const T>(a.z) + seq.row * a.z_b + seq.first * a.z_s + h * a.z_h + p_first;
    const auto copy_in = [&](int n) {
      if (n >= chunks) return;
      if (n >= kIn) s.weighed[n % kIn].wait((n / kIn - 1) % 2);
      auto& to = s.in[n % kIn];
      const int t = chunk_of(n) * CT, live = seq.length - t;
      copy_tokens<Sh>(to.x, x + (long long)t * x_s, x_s, live, width);
      if (gated) copy_tokens<Sh>(to.z, z + (long long)t * a.z_s, int(a.z_s), live, width);
      copy_decays<Sh>(to.decays, at<const float>(a.L) + tokens + t, int(a.H * a.tokens), live);
      s.came[n % kIn].arrive_when_copied();
    };
    copy_in(0), copy_in(1);
    if constexpr (Sh::kTurns) row.load(bias, at<const float>(back ? a.C_bias : a.B_bias) + (long long)h * R * N);
#pragma unroll 1
    for (int n = 0; n < kAhead; ++n) copy(n);
    for (int n = 0; n < chunks; ++n) {
      copy(n + kAhead);
      auto& rows = s.rows[n % kStages];
      const int live = seq.length - chunk_of(n) * CT;
      s.arrived[n % kStages].wait(n / kStages % 2);
      if (live < CT) {
        clear_rows<Sh>(rows, live);
        wait_at(kTurning, 128);
      }
      row.template turn<Row::ITEMS, true>(rows, rows, bias, s.turns[n % kStages]);
      publish();
      arrive_at(kFull + n % kStages, 256);
      copy_in(n + 2);
    }
  } else {
    if constexpr (N <= 128) take_registers<160>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2;
    const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
    const long long of_unit = (unit * all_p + p_first + p[0]) * N + col;
    const auto saved = [&] {
      const long long number = a.segment / a.segment_spans + (a.cu ? blockIdx.y : blockIdx.y * a.segments);
      return at<const float>(a.saved) + ((number * H + h) * all_p + p_first + p[0]) * N + col;
    };
    float S[N / 8][4] = {};
    if (back) {
      if (const float* from = at<const float>(high == all ? a.dfinal : a.dstate)) load_state(S, from + of_unit, p, width);
    } else {
      load_state(S, saved(), p, width);
    }
    float into[Sh::R][2], steep[Sh::R][2];  // psi, or phi; with gates z into / (1 + 2^(z steep)) is phi silu(z zeta)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float zeta = Sh::kRanks ? s.parameters.zeta[r][p[e]] : 1.f;
        into[r][e] = !Sh::kRanks ? 1.f : back ? s.parameters.phi[r][p[e]] : s.parameters.psi[r][p[e]];
        if (gated) into[r][e] *= zeta, steep[r][e] = -LOG2_E * zeta;
      }
    // A chunk's v or dys, weighed, as a product's A operand; gives the chunk's decay.
    const auto weigh = [&](unsigned (&to)[4][4], int n) {
      const auto& in = s.in[n % kIn];
      s.came[n % kIn].wait(n / kIn % 2);
      const float end = in.decays.L()[CT - 1];
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4], zs[4] = {};
        in.x.columns(xs, tb * 16, p0);
        if (gated) in.z.columns(zs, tb * 16, p0);
        float factor[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = (tb * 16 + e / 2 * 8) % CT + col + e % 2;
          factor[e] = back ? exp_(in.decays.L()[t]) : exp_(end - in.decays.L()[t]) * in.decays.w()[t];
        }
        const auto fill = [&](auto has_gates) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float2 f = Two::unpack(xs[e]);
            const float2 z = Two::unpack(zs[e]);
            if (has_gates) f.x *= z.x * factor[e % 2 * 2], f.y *= z.y * factor[e % 2 * 2 + 1];
#pragma unroll
            for (int b = tb; b < 4; b += TB) {
              const int r = Sh::rank(2 * b + e % 2);
              float2 v = {f.x * into[r][e / 2], f.y * into[r][e / 2]};
              if (has_gates)
                v.x *= reciprocal(1.f + exp2_(z.x * steep[r][e / 2])), v.y *= reciprocal(1.f + exp2_(z.y * steep[r][e / 2]));
              else  // last, as in forward.cuh: the states have the same bits
                v.x *= factor[e % 2 * 2], v.y *= factor[e % 2 * 2 + 1];
              to[b][e / 2 + e % 2 * 2] = Two::pack(v.x, v.y);
            }
          }
        };
        if (gated) fill(Bool<true>{});
        else fill(Bool<false>{});
      }
      __syncwarp();
      if (lane == 0) s.weighed[n % kIn].arrive();
      return exp_(end);
    };
    char* to = at<char>(back ? a.carried : a.states) + (lies * gridDim.x + blockIdx.x) * int(sizeof(s.out));

    unsigned weighed[4][4], next[4][4];
    float decay = 1.f;
    if (chunks > 0) decay = weigh(weighed, 0);
    for (int n = 0; n < chunks; ++n) {
      // the state as it is leaves: the warp's 16 rows
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        const unsigned four[4] = {
            Two::pack(S[2 * k][0], S[2 * k][1]), Two::pack(S[2 * k][2], S[2 * k][3]),
            Two::pack(S[2 * k + 1][0], S[2 * k + 1][1]), Two::pack(S[2 * k + 1][2], S[2 * k + 1][3])};
        s.out.put_rows(four, p0, k * 16);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < s.out.kParts * 4; ++i) {
        const int on = (i / 4 * P + p0) * 128 + (i % 4 * 32 + lane) * 16;
        put16(to + (long long)chunk_of(n) * gridDim.x * int(sizeof(s.out)) + on, get16(reinterpret_cast<const char*>(s.out.x) + on));
      }
      if (back && chunk_of(n) == 0) {
        const float energy = over_warp(dot_state(S, saved(), p, width));
        if (lane == 0) s.energy[warp] = energy;
        wait_at(kProducts, 128);
        if (threadIdx.x == 0)
          at<float>(a.energy)[span * every * gridDim.x + blockIdx.x] = decay * (s.energy[0] + s.energy[1] + s.energy[2] + s.energy[3]);
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[j][e] *= decay;
      wait_at(kFull + n % kStages, 256);
      constexpr int kWide = N < 128 ? N : 128;
      start();
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int m = 0; m < N; m += kWide)
          Product<T, kWide>::template held<kAlong>(
              reinterpret_cast<float(&)[kWide / 8][4]>(S[m / 8]), weighed[c], s.rows[n % kStages].descriptor(c * 16, m));
      close();
      if (N > 128) settle();  // ptxas makes these products one by one in any case
      if (n + 1 < chunks) decay = weigh(next, n + 1);  // meanwhile
      settle();
      keep(weighed);
      if (n + kStages < chunks) arrive_at(kEmpty + n % kStages, 256);
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) weighed[c][e] = next[c][e];
    }
    if (back) store_state(at<float>(a.dstate) + of_unit, S, p, width);
  }
#endif
}

}  // namespace nam56r::ssd
