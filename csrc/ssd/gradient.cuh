// The gradients of all inputs, chunk by chunk, from the states S before and the gradients G of the states after each chunk.
//
// With v = x psi, dys = dy phi silu(z zeta) per rank, left = e^(L_end - L), and mix as in forward.cuh:
//   scores = q k^T, dm = dys v^T
//   y^T  = e^L S q^T      + v^T (scores * mix)^T       dq = e^L (dys S)    + (dm * mix) k
//   dv^T = left w (G k^T) + dys^T (scores * mix)       dk = left w (v G)   + (dm * mix)^T q
// A block has a group's heads (or some of them) and a span of chunks, and takes a chunk's heads one after the other, in four
// warpgroups that each have a part of the code. Two make the next head's tiles: one copies, makes the turns, and has the
// angles' gradients of the head before; one turns q and k and makes v and dys. One has what is along N: the scores, dm, dq
// and dk, so the biases and C and B, whose sums over heads stay in registers, 2 [64, N]. One has what is along P: y, dv and
// <S, G>, so the gates, z and x. y and dv are transposed, so that a thread has all ranks of its tokens.
// Shared memory: q, k, dys, v, x, z, dy and turns of two heads (of one where N is 256); S and G, which lie in memory as
// wgmma reads them and are fetched whole by the last warp that is done with those before; scratch: the scores and dm through
// the decays, later what is turned back of q and of k; B and C where a rank has few tokens.
// Bound: latency and instruction fetches: 5 000 instructions a scheduler and head from 75 KiB of code; of the four warps on a
// scheduler that with N is busy. So loops stay loops where registers allow it. 11.5 MFLOP a chunk and head at N 128.
#pragma once

#include "ssd/accumulators.cuh"

namespace nam56r::ssd {

struct Place {
  int sequence, group, split, blocks, chunk, chunks, first;  // the first chunk, how many; the first unit
  long long span;
  Sequence seq;
};

template <class Sh>
struct GradientStage {  // a head's
  Tile<ROWS, Sh::N> q, k;
  Tile<ROWS, P> dys;
  Tile<Sh::kRanks ? ROWS : 8, P> scaled;  // v, which without ranks is x
  Tile<Sh::CT, P> x, z, dy;
  Turns<Sh> turns;
  Decays<Sh> decays;
  Parameters<Sh> parameters;
  // sums over a warp's columns of P, or over its rows, or over their columns
  float read[4][Sh::CT], written[4][Sh::CT], later[4][Sh::CT], pairs[ROWS], own[ROWS], energy[4];

  __device__ auto& v() {
    if constexpr (Sh::kRanks) return scaled;
    else return x;
  }
};

template <class Sh, bool kKept>
struct GradientKept {  // B and C of the chunk, for all heads
  Tile<ROWS, Sh::N> C, B;
};
template <class Sh>
struct GradientKept<Sh, false> {};

template <class Sh>
struct GradientShared {
  static constexpr bool kKept = Sh::R >= 4 && Sh::N <= 128;
  using Turned = float[ROWS][Sh::NA + 4];
  struct alignas(1024) Scratch {
    char bytes[sizeof(Turned) > 8192 ? sizeof(Turned) : 8192];

    template <class X>
    __device__ X& as() { return *reinterpret_cast<X*>(bytes); }
  };
  static constexpr int kOnce = (kKept ? 2 : 0) * sizeof(Tile<ROWS, Sh::N>) + 2 * sizeof(Tile<P, Sh::N>) + 2 * sizeof(Scratch) + 16 * Sh::CT + 256;
  static constexpr int kStages = kOnce + 2 * sizeof(GradientStage<Sh>) > 227 * 1024 ? 1 : 2;
  GradientStage<Sh> stage[kStages];
  Tile<P, Sh::N> S, G;
  Scratch scratch[2];
  float by_token[4][Sh::CT];
  Arrival states;
  int done;
  Place here;  // not in registers, of which there are too few
  GradientKept<Sh, kKept> kept;
};

template <class Sh>
struct Registers {  // of the warpgroups' threads; without ranks there are more angles a thread, and smaller rows
  static constexpr int kN = 240, kP = 144, kRows = Sh::R == 1 ? 56 : 64, kAngles = 128 - kRows;
};

// Where a block works; chunks is 0 where there is nothing.
template <class Sh>
__device__ inline Place place(const Arguments& a) {
  Place p{};
  p.group = blockIdx.x / int(a.splits), p.split = blockIdx.x % int(a.splits), p.blocks = max(1, int(a.P) / P);
  p.first = p.group * int(a.heads_per_group) * p.blocks + p.split * int(a.units);
  long long of_sequence;
  if (a.cu) {
    p.span = a.segment + blockIdx.y;
    if (p.span >= a.spans) return p;
    p.sequence = at<const int>(a.sequence_of)[p.span];
    if (p.sequence >= a.sequences) return p;
    of_sequence = p.span - first_span(a, p.sequence);
  } else {
    p.sequence = blockIdx.y / int(a.segment_spans), of_sequence = a.segment + blockIdx.y % int(a.segment_spans);
    if (of_sequence >= a.spans) return p;
    p.span = p.sequence * a.spans + of_sequence;
  }
  p.seq = sequence(a, p.sequence);
  p.chunk = int(of_sequence * a.every);
  p.chunks = max(0, min(int(a.every), (p.seq.length + Sh::CT - 1) / Sh::CT - p.chunk));
  return p;
}

// Where in a block's work a warpgroup is: chunk j, unit i of the block's.
struct Step {
  int j = 0, i = 0;

  __device__ void next(int units) {
    if (++i == units) i = 0, ++j;
  }
};

constexpr int kReady = 3, kAngles = 7;  // barriers: what make_angles has for a stage is there (two of them), its threads are at one point

// The warpgroup that makes q and k, v and dys.
template <class Sh>
__device__ __forceinline__ void make_rows(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Row = Rows<Sh, 2>;
  constexpr int CT = Sh::CT, R = Sh::R, N = Sh::N, kStages = GradientShared<Sh>::kStages;
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units;
  const bool gated = a.z;
  const float plain = gated ? 0.f : 1.f;
  const Row row;
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + here.group * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + here.group * a.C_g;
  Step step;
  for (int it = 0; it < items; ++it) {
    const int stage = it % kStages, unit = here.first + step.i, h = here.blocks == 1 ? unit : unit / 2;
    const int start_ = (here.chunk + step.j) * CT, live = seq.length - start_;
    const bool first_unit = step.i == 0;
    auto& to = s.stage[stage];
    step.next(units);
    typename Row::Bias bias;
    typename Row::Coming coming;
    if constexpr (Sh::kTurns) coming.load(row, at<const float>(row.tile ? a.B_bias : a.C_bias) + h * R * N);
    if (it >= kStages) wait_at(kEmpty + stage, 512);
    const auto copy = [&](auto& q, auto& k) {
      int of_token[2] = {int(a.C_s), int(a.B_s)}, of_rank[2] = {int(a.C_r), int(a.B_r)};
#pragma unroll
      for (int i = 0; i < 2; ++i) asm volatile("" : "+r"(of_token[i]), "+r"(of_rank[i]));  // not made ahead, and spilled
      copy_rows<Sh>(q, C + start_ * a.C_s, of_token[0], of_rank[0], live);
      copy_rows<Sh>(k, B + start_ * a.B_s, of_token[1], of_rank[1], live);
      commit();
      wait_copies();
      if constexpr (Sh::kTurns) wait_at(kTurning, 128);
    };
    auto& turned = row.tile ? to.k : to.q;
    const Tile<ROWS, N>* from = &turned;
    if constexpr (!GradientShared<Sh>::kKept)
      copy(to.q, to.k);
    else {
      from = row.tile ? &s.kept.B : &s.kept.C;
      if (first_unit) {
        wait_at(kTurning, 128);  // the chunk before is turned
        copy(s.kept.C, s.kept.B);
      }
    }
    wait_at(kReady + stage, 256);
    if constexpr (Sh::kTurns) coming.round(bias);
    row.template turn<1>(turned, *from, bias, to.turns);
#pragma unroll 1
    for (int n = 0; n < (CT * 8 + 127) / 128; ++n) {
      const int i = threadIdx.x % 128 + n * 128, t = i / 8, c = i % 8 * 8;
      if (CT * 8 < 128 && i >= CT * 8) break;
      const uint4 raw = get16(to.dy.unit(t, c));
      if (!Sh::kRanks && !gated) {
        put16(to.dys.unit(t, c), raw);
        continue;
      }
      float d[8], z[8], x[8];
      unpack8<T>(d, raw);
      unpack8<T>(z, gated ? get16(to.z.unit(t, c)) : uint4{});
      unpack8<T>(x, get16(to.x.unit(t, c)));
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        float gate[8], v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[e] = z[e];
        if constexpr (Sh::kRanks) {
          float psi[8], phi[8], zeta[8];
          load(zeta, &to.parameters.zeta[r][c]), load(psi, &to.parameters.psi[r][c]), load(phi, &to.parameters.phi[r][c]);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = x[e] * psi[e];
          put16(to.scaled.unit(r * CT + t, c), pack8<T>(v));
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = d[e] * phi[e], gate[e] *= zeta[e];
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = d[e];
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] *= silu(gate[e], plain);
        put16(to.dys.unit(r * CT + t, c), pack8<T>(v));
      }
    }
    publish();
    arrive_at(kFull + stage, 384);
  }
}

// The warpgroup that makes turns, copies the rest, and has the angles' gradients.
template <class Sh>
__device__ __forceinline__ void make_angles(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  constexpr int CT = Sh::CT, R = Sh::R, NA = Sh::NA, kStages = GradientShared<Sh>::kStages;
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units, width = min(P, int(a.P)), t = int(threadIdx.x) % 128;
  const bool gated = a.z;
  Step step, behind;
  for (int it = 0; it < items + (Sh::kTurns ? kStages : 0); ++it) {
    const int stage = it % kStages;
    auto& to = s.stage[stage];
    if constexpr (Sh::kTurns)
      if (it >= kStages) {  // the angles' gradients of the head that had the stage
        const int unit = here.first + behind.i, h = here.blocks == 1 ? unit : unit / 2, start_ = (here.chunk + behind.j) * CT;
        const int live = seq.length - start_;
        const long long token = seq.token + start_;
        const bool each = a.angle_heads > 1;
        const long long place = each ? unit * a.tokens + token : (here.group * a.splits + here.split) * a.tokens + token;
        AngleGradients<Sh> angles;
        angles.load(at<const float>(a.angles) + seq.row * a.a_b + (seq.first + start_) * a.a_s + h * a.a_h, int(a.a_s), live);
        angles.sum(
            s.scratch[0].template as<typename GradientShared<Sh>::Turned>(), s.scratch[1].template as<typename GradientShared<Sh>::Turned>(),
            to.decays, at<float>(a.dangle_sum) + place * NA, each || behind.i == 0,
            at<float>(a.total) + ((here.span * a.every + behind.j) * a.H * here.blocks + unit) * NA, s.by_token, live);
        wait_at(kAngles, 128);
        if (t < CT && t < live) {
          float of_token = 0.f;
#pragma unroll
          for (int n = 0; n < AngleGradients<Sh>::kWarps; ++n) of_token += s.by_token[n][t];
          at<float>(a.ddt_turned)[unit * a.tokens + token + t] = PI * of_token;
        }
        behind.next(units);
      }
    if (it >= items) continue;
    const int j = step.j, unit = here.first + step.i, h = here.blocks == 1 ? unit : unit / 2, p_first = (unit - h * here.blocks) * P;
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_;
    const long long token = h * a.tokens + seq.token + start_, in_row = seq.first + start_;
    step.next(units);
    Angles<Sh> angle;
    float base = 0.f;
    if constexpr (Sh::kTurns) {
      angle.load(
          at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s), at<const float>(a.DT) + token, live);
      if (Angles<Sh>::mine())
        base = at<const float>(a.bases)[((here.span * a.every + j) * a.H + h) * NA + Angles<Sh>::index()];
    }
    if (it >= kStages) wait_at(kEmpty + stage, 512);
    copy_tokens<Sh>(to.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live, width);
    copy_tokens<Sh>(to.dy, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live, width);
    if (gated)
      copy_tokens<Sh>(to.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live, width);
    copy_decays<Sh>(to.decays, a, token, live);
    copy_parameters<Sh, 128>(to.parameters, a, h, p_first, width);
    commit();
    if constexpr (Sh::kTurns) angle.turn(to.turns, base);
    wait_copies();
    arrive_at(kReady + stage, 256);
  }
}

// Fetches the states of the step's head, if it has one.
template <class Sh>
__device__ __forceinline__ void fetch_states(const Arguments& a, GradientShared<Sh>& s, const Place& here, const Step& step) {
  const int units_all = int(a.H) * here.blocks;
  const long long from = ((long long)(blockIdx.y * int(a.every) + step.j) * units_all + here.first + step.i) * int(sizeof(s.S));
  s.states.expect(2 * sizeof(s.S));
  s.states.copy(&s.S, at<const char>(a.states) + from, sizeof(s.S));
  s.states.copy(&s.G, at<const char>(a.carried) + from, sizeof(s.G));
}

// A warp is done with the states; the last of eight fetches the next.
template <class Sh>
__device__ __forceinline__ void leave_states(const Arguments& a, GradientShared<Sh>& s, const Place& here, const Step& next, bool more) {
  if (threadIdx.x % 32 == 0) {
    __threadfence_block();
    if (atomicAdd(&s.done, 1) % 8 == 7 && more) fetch_states<Sh>(a, s, here, next);
  }
}

// The warpgroup that has N: scores and dm, and from them the gradients of q and k, so of C and B, and of the biases.
template <class Sh>
__device__ __forceinline__ void along_n(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, R = Sh::R, N = Sh::N, NA = Sh::NA, EIGHTS = Sh::EIGHTS;
  constexpr int kStages = GradientShared<Sh>::kStages, kWide = N < 128 ? N : 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2, p0 = warp * 16;
  const int rows[2] = {p0 + row, p0 + row + 8}, mine[2] = {rows[0] % CT, rows[1] % CT};  // the thread's rows, their tokens
  const int units = int(a.units), items = here.chunks * units;
  auto& scores = s.scratch[0].template as<Tile<ROWS, ROWS>>();
  auto& dS = s.scratch[1].template as<Tile<ROWS, ROWS>>();

  float sum[2][N / 8][4] = {};  // of C's and B's gradients
  Step step;
  for (int it = 0; it < items; ++it) {
    const int j = step.j, unit = here.first + step.i, stage = it % kStages;
    const bool last_unit = step.i + 1 == units;
    step.next(units);
    const int start_ = (here.chunk + j) * CT, live = here.seq.length - start_;
    auto& in = s.stage[stage];
    const auto& decays = in.decays;
    wait_at(kFull + stage, 384);
    float scale[2][2];  // of the rows of dq and dk
    {
      float m[ROWS / 8][4], dm[ROWS / 8][4];
      start();
      across<T, N>(m, in.q, in.k), across<T, P>(dm, in.dys, in.v());
      finish();
      if (Sh::kTurns && it) wait_at(kRead, 256);  // what was turned back for the head before

      // scores and dm through the decays
      const float end = decays.L[CT - 1];
      const float l[2] = {decays.L[mine[0]], decays.L[mine[1]]};
      const float own[2] = {own_weight(decays, mine[0]), own_weight(decays, mine[1])};
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[0][e] = exp_(l[e]), scale[1][e] = exp_(end - l[e]) * decays.w[mine[e]];
      float pairs[2] = {}, owned[2] = {}, later[EIGHTS * 2] = {};
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        const float2 L = *reinterpret_cast<const float2*>(&decays.L[i * 8 + col]);
        const float2 w = *reinterpret_cast<const float2*>(&decays.w[i * 8 + col]);
        float decay[4], weighed[4], mix[4], same[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int d = mine[e / 2] - i * 8 - col - e % 2;
          const float since = exp_(l[e / 2] - (e % 2 ? L.y : L.x));
          decay[e] = d > 0 ? since : 0.f, same[e] = d == 0 ? 1.f : 0.f;
          weighed[e] = decay[e] * (e % 2 ? w.y : w.x), mix[e] = same[e] * own[e / 2] + weighed[e];
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &x = m[r * EIGHTS + i][e], &dx = dm[r * EIGHTS + i][e];
            const float both = x * dx;
            pairs[e / 2] += both * weighed[e], owned[e / 2] += both * same[e], later[2 * i + e % 2] += both * decay[e];
            x *= mix[e], dx *= mix[e];
          }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float of_row = over_quad(pairs[e]), of_own = over_quad(owned[e]);
        if (lane % 4 == 0) in.pairs[rows[e]] = of_row, in.own[rows[e]] = of_own;
      }
      constexpr int kFold = EIGHTS * 2 < 8 ? EIGHTS * 2 : 8;
#pragma unroll
      for (int from = 0; from < EIGHTS * 2; from += kFold) {
        float part[kFold];
#pragma unroll
        for (int i = 0; i < kFold; ++i) part[i] = later[from + i];
        const float all = fold(part);
        const int i = from + folded<kFold>();
        if (row % (8 / kFold) == 0) in.later[warp][i / 2 * 8 + col + i % 2] = all;
      }
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores.put(rows[e], n * 8 + col, Two::pack(m[n][2 * e], m[n][2 * e + 1]));
          dS.put(rows[e], n * 8 + col, Two::pack(dm[n][2 * e], dm[n][2 * e + 1]));
        }
    }
    publish();
    arrive_at(kScores, 256);
    wait_at(kProducts, 128);
    s.states.wait(it % 2);
#pragma unroll
    for (int side = 0; side < 2; ++side) {  // q, k
      const auto &tile = side ? in.k : in.q, &other = side ? in.q : in.k;
      const Tile<ROWS, P>& by = side ? in.v() : in.dys;
      const auto& state = side ? s.G : s.S;
      auto& turned = s.scratch[side].template as<typename GradientShared<Sh>::Turned>();
      float d[N / 8][4];
      start();
#pragma unroll
      for (int k = 0; k < P / 16; ++k)
#pragma unroll
        for (int n = 0; n < N; n += kWide) {
          auto& part = reinterpret_cast<float(&)[kWide / 8][4]>(d[n / 8]);
          k ? Product<T, kWide>::template shared<kAlong>(part, by.descriptor(0, k * 16), state.descriptor(k * 16, n))
            : Product<T, kWide>::template shared<kAlong, 0>(part, by.descriptor(0, 0), state.descriptor(0, n));
        }
      finish();
      if (side) leave_states<Sh>(a, s, here, step, it + 1 < items);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d[n][e] *= scale[side][e / 2];
      start();
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int n = 0; n < N; n += kWide) {
          auto& part = reinterpret_cast<float(&)[kWide / 8][4]>(d[n / 8]);
          if (side)
            Product<T, kWide>::template shared<kAlong, 1, kAlong>(part, dS.descriptor(c * 16, 0), other.descriptor(c * 16, n));
          else
            Product<T, kWide>::template shared<kAlong>(part, dS.descriptor(0, c * 16), other.descriptor(c * 16, n));
        }
      finish();
      // what was scores, or dS, is read: by the other warpgroup, or by this one
      if (side) wait_at(kProducts, 128);
      else wait_at(kScoresRead, 256);
      if constexpr (Sh::kTurns) {
        float2 back[2][NA / 8];
        turn_back<Sh>(d, p0, tile, in.turns, back);
        add_bias<Sh>(
            d, at<float>(side ? a.dB_bias : a.dC_bias) + ((long long)blockIdx.y * int(a.H) * here.blocks + unit) * (R < 4 ? 4 : R) * N,
            turned[p0]);
        put_turned<Sh>(turned, p0, back);
      }
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[side][n][e] += d[n][e];
    }
    if constexpr (Sh::kTurns) arrive_at(kTurned, 256);
    arrive_at(kEmpty + stage, 512);
    if (last_unit) {
      const Sequence& seq = here.seq;
      const long long in_row = seq.first + start_;
      const long long at_B = here.split * a.dB_split + seq.row * a.dB_b + in_row * a.dB_s + here.group * a.dB_g;
      const long long at_C = here.split * a.dC_split + seq.row * a.dC_b + in_row * a.dC_s + here.group * a.dC_g;
      const int size = a.splits > 1 ? 4 : 2;
      store_rows<Sh>(sum[0], at<char>(a.dC) + size * at_C, a.splits == 1, int(a.dC_s), int(a.dC_r), p0, live);
      store_rows<Sh>(sum[1], at<char>(a.dB) + size * at_B, a.splits == 1, int(a.dB_s), int(a.dB_r), p0, live);
#pragma unroll
      for (int n = 0; n < N / 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n / (N / 8)][n % (N / 8)][e] = 0.f;
    }
  }
}

// The warpgroup that has P: y and dv, and from them the gradients of z and x, of MIMO's weights, and of D.
template <class Sh>
__device__ __forceinline__ void along_p(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, R = Sh::R, TB = Sh::TB, N = Sh::N, EIGHTS = Sh::EIGHTS, kStages = GradientShared<Sh>::kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 4, col = lane % 4 * 2;
  const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
  const int units = int(a.units), items = here.chunks * units, all_p = int(a.P), width = min(P, all_p), H = int(a.H), U = H * here.blocks;
  const bool gated = a.z;
  const float plain = gated ? 0.f : 1.f;  // without gates z is 0
  const auto& scores = s.scratch[0].template as<Tile<ROWS, ROWS>>();
  if (threadIdx.x == 128) fetch_states<Sh>(a, s, here, {});

  Step step;
  for (int it = 0; it < items; ++it) {
    const int j = step.j, unit = here.first + step.i, h = here.blocks == 1 ? unit : unit / 2, p_first = (unit - h * here.blocks) * P;
    step.next(units);
    const Sequence& seq = here.seq;
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_, stage = it % kStages, t = int(threadIdx.x) % 128;
    const long long token = seq.token + start_, in_row = seq.first + start_, of_unit = unit * a.tokens + token;
    auto& in = s.stage[stage];
    const auto& decays = in.decays;
    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };

    wait_at(kFull + stage, 384);
    s.states.wait(it % 2);
    float y[ROWS / 8][4], dv[ROWS / 8][4];
    const float end = decays.L[CT - 1];
    {
      float both[P / 8][4], energy = 0.f;  // <S, G>, the diagonal of a product
      start();
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {  // the three together: ptxas spills less than one after the other
        product_across<T>(both, s.S, s.G, k), product_across<T>(y, s.S, in.q, k), product_across<T>(dv, s.G, in.k, k);
      }
      finish();
      leave_states<Sh>(a, s, here, step, it + 1 < items);
#pragma unroll
      for (int n = 0; n < P / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) energy += n * 8 + col + e % 2 == p[e / 2] ? both[n][e] : 0.f;
#pragma unroll
      for (int d = 16; d; d /= 2) energy += __shfl_xor_sync(~0u, energy, d);
      if (lane == 0) in.energy[warp] = energy;
    }
    // what tokens read of S and write to G, before y and dv take their decays
    unsigned dys[4][4], v[4][4];  // transposed, as A operands
    {
      constexpr int kFold = R == 1 ? 8 : EIGHTS * 2;  // sums for tokens; without ranks of a half of them at a time
      float read[kFold], written[kFold];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        in.dys.operand_columns(dys[b], b * 16, p0), in.v().operand_columns(v[b], b * 16, p0);
        if (b == 0 || (R == 1 && b == 2))
#pragma unroll
          for (int i = 0; i < kFold; ++i) read[i] = 0.f, written[i] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = (2 * b + half) % EIGHTS, i = eight * 2 % kFold;
          const float2 L = *reinterpret_cast<const float2*>(&decays.L[eight * 8 + col]);
          const float2 w = *reinterpret_cast<const float2*>(&decays.w[eight * 8 + col]);
          const float2 grown = {exp_(L.x), exp_(L.y)}, stays = {exp_(end - L.x), exp_(end - L.y)};
          const float2 weighed = {stays.x * w.x, stays.y * w.y};
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 f = Two::unpack(dys[b][2 * half + e]), g = Two::unpack(v[b][2 * half + e]);
            float *o = &y[2 * b + half][e * 2], *u = &dv[2 * b + half][e * 2];
            read[i] += f.x * o[0], read[i + 1] += f.y * o[1], written[i] += g.x * u[0], written[i + 1] += g.y * u[1];
            o[0] *= grown.x, o[1] *= grown.y, u[0] *= weighed.x, u[1] *= weighed.y;
          }
          if (R == 1 || b * 16 + half * 8 >= ROWS - CT)  // the token's last rank
            read[i] *= grown.x, read[i + 1] *= grown.y, written[i] *= stays.x, written[i + 1] *= stays.y;
        }
        if (b == 3 || (R == 1 && b == 1)) {
          const float of_read = fold(read), of_written = fold(written);
          const int i = (R == 1 ? b / 2 * 8 : 0) + folded<kFold>(), token_ = i / 2 * 8 + col + i % 2;
          if (row % (8 / kFold) == 0) in.read[warp][token_] = of_read, in.written[warp][token_] = of_written;
        }
      }
    }
    wait_at(kScores, 256);
    start();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Product<T, ROWS>::template held<kAcross>(y, v[c], scores.descriptor(0, c * 16));
      Product<T, ROWS>::template held<kAlong>(dv, dys[c], scores.descriptor(c * 16, 0));
    }
    finish();
    arrive_at(kScoresRead, 256);
    wait_at(kProducts + 1, 128);
    if (t < CT && t < live) {
      const auto sum = [&](const float (&x)[4][CT]) { return x[0][t] + x[1][t] + x[2][t] + x[3][t]; };
      float of_pairs = 0.f, of_own = 0.f;
#pragma unroll
      for (int r = 0; r < R; ++r) of_pairs += in.pairs[r * CT + t], of_own += in.own[r * CT + t];
      const float written = sum(in.written);
      at<float>(a.PAIRS)[of_unit + t] = of_pairs, at<float>(a.DOWN)[of_unit + t] = of_own;
      at<float>(a.READ)[of_unit + t] = sum(in.read), at<float>(a.WRITE)[of_unit + t] = written;
      at<float>(a.DW)[of_unit + t] = sum(in.later) + written;
      if (t == 0)
        at<float>(a.energy)[(here.span * a.every + j) * U + unit] =
            exp_(end) * (in.energy[0] + in.energy[1] + in.energy[2] + in.energy[3]);
    }

    // gates, and sums over ranks and tokens; dz leaves through z's place, dx through dy's
    constexpr int kInto = (2 * R + 2 + 3) / 4 * 4;
    float gates[4 * R] = {}, into[kInto] = {};  // of phi [R][2], of zeta / phi; of psi, of D [2]
#pragma unroll
    for (int tb = 0; tb < TB; ++tb) {
      unsigned xs[4], zs[4] = {}, ds[4];
      in.x.columns(xs, tb * 16, p0);
      in.dy.columns(ds, tb * 16, p0);
      if (gated) in.z.columns(zs, tb * 16, p0);
      float2 dz[4] = {}, dx[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 x = Two::unpack(xs[e]), z = Two::unpack(zs[e]), dy = Two::unpack(ds[e]);
        const float skip = in.parameters.skip[p[e / 2]];
#pragma unroll
        for (int b = tb; b < 4; b += TB) {
          const int r = Sh::rank(2 * b + e % 2);
          const float psi = parameter(in.parameters.psi, r, e / 2), zeta = parameter(in.parameters.zeta, r, e / 2);
          const float phi = parameter(in.parameters.phi, r, e / 2), through = skip * psi, both = zeta * phi;
          const float *o = &y[2 * b + e % 2][e / 2 * 2], *u = &dv[2 * b + e % 2][e / 2 * 2];
          const float2 of_gate = {dy.x * (o[0] + through * x.x), dy.y * (o[1] + through * x.y)};
          const float2 gate = {z.x * zeta, z.y * zeta}, open = {sigmoid(gate.x), sigmoid(gate.y)};
          const float2 silu = {gate.x * open.x + plain, gate.y * open.y + plain};
          const float2 back = {of_gate.x * (open.x + silu.x - silu.x * open.x), of_gate.y * (open.y + silu.y - silu.y * open.y)};
          const float2 open_dy = {dy.x * phi * silu.x, dy.y * phi * silu.y};
          const float2 dv_ = {u[0] + skip * open_dy.x, u[1] + skip * open_dy.y};
          if constexpr (Sh::kRanks) {
            gates[2 * r + e / 2] += of_gate.x * silu.x + of_gate.y * silu.y;
            gates[2 * R + 2 * r + e / 2] += back.x * z.x + back.y * z.y;
            into[2 * r + e / 2] += dv_.x * x.x + dv_.y * x.y;
          }
          into[2 * R + e / 2] += (open_dy.x * x.x + open_dy.y * x.y) * psi;
          dz[e].x += back.x * both, dz[e].y += back.y * both;
          dx[e].x += dv_.x * psi, dx[e].y += dv_.y * psi;
        }
      }
      if (CT < 16) both_halves(dz), both_halves(dx);
#pragma unroll
      for (int e = 0; e < 4; ++e) zs[e] = Two::pack(dz[e].x, dz[e].y), ds[e] = Two::pack(dx[e].x, dx[e].y);
      if (gated) in.z.put_columns(zs, tb * 16, p0);
      in.dy.put_columns(ds, tb * 16, p0);
    }
    const long long of_tokens = ((seq.row * a.S + in_row) * H + h) * all_p + p_first;
    if (gated) store_columns<Sh>(at<T>(a.dz) + of_tokens, H * all_p, in.z, p0, live, width);
    store_columns<Sh>(at<T>(a.dx) + of_tokens, H * all_p, in.dy, p0, live, width);
    const long long of_ranks = ((long long)blockIdx.y * H + h) * R * all_p + p_first;
    if constexpr (Sh::kRanks) {
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) gates[2 * R + i] *= parameter(in.parameters.phi, i / 2, i % 2);
      over_row(gates);
      const bool of_phi = !(threadIdx.x & 2);
      const int i = over_row_first<4 * R>() % (2 * R), c = p0 + row + i % 2 * 8;
      float* to = at<float>(of_phi ? a.dphi : a.dzeta) + of_ranks + i / 2 * all_p + c;
#pragma unroll
      for (int n = 0; n < R; ++n) add(to + n / 2 * all_p + n % 2 * 8, gates[n], c + n % 2 * 8 < width && (gated || of_phi));
    }
    over_row(into);
#pragma unroll
    for (int n = 0; n < kInto / 4; ++n) {
      const int i = over_row_first<kInto>() + n, c = p0 + row + i % 2 * 8;
      const bool of_psi = Sh::kRanks && i < 2 * R, of_skip = a.D && i / 2 == R;
      float* to = of_psi ? at<float>(a.dpsi) + of_ranks + i / 2 * all_p : at<float>(a.dD) + ((long long)blockIdx.y * H + h) * all_p + p_first;
      add(to + c, into[n], c < width && (of_psi || of_skip));
    }
    arrive_at(kEmpty + stage, 512);
  }
}

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(512, 1) gradient(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<GradientShared<Sh>*>(bytes);
  const Place here = place<Sh>(a);
  if (here.chunks == 0) return;
  if (threadIdx.x == 0) s.states.make(), s.done = 0, s.here = here;
  publish();
  __syncthreads();
  if (threadIdx.x < 128) {
    take_registers<Registers<Sh>::kN>();
    along_n<Sh>(a, s, s.here);
  } else if (threadIdx.x < 256) {
    take_registers<Registers<Sh>::kP>();
    along_p<Sh>(a, s, s.here);
  } else if (threadIdx.x < 384) {
    give_registers<Registers<Sh>::kRows>();
    make_rows<Sh>(a, s, s.here);
  } else {
    give_registers<Registers<Sh>::kAngles>();
    make_angles<Sh>(a, s, s.here);
  }
}

}  // namespace nam56r::ssd
