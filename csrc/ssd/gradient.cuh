// The gradients of all inputs, chunk by chunk, from the states S before and the gradients G of the states after each chunk.
//
// With v = x psi, dys = dy phi silu(z zeta) per rank, left = e^(L_end - L), and mix as in forward.cuh:
//   scores = q k^T, dm = dys v^T
//   y^T  = e^L S q^T      + v^T (scores * mix)^T       dq = e^L (dys S)    + (dm * mix) k
//   dv^T = left w (G k^T) + dys^T (scores * mix)       dk = left w (v G)   + (dm * mix)^T q
// A block has a group's heads (or some of them) and a span of chunks, and takes a chunk's heads one after the other. Of its
// three warpgroups one makes the next head's tiles: copies, gates, turns. One has what reads: y and dq, so the gradients of
// z and of C, a sum over heads that stays in registers [64, N]. One has what writes: dv and dk, so x's and B's. Both are
// one function, in which q and k, dys and v, S and G are exchanged. Each makes its own scores: they meet only where the
// angles' gradients are added. y and dv are transposed, so that a thread has all ranks of its tokens.
// Shared memory: q, k, dys, v, x, z, dy and turns of two heads (of one where N is 256); S and G, which lie in memory as
// wgmma reads them and are fetched whole by the last warp that is done with those before; scratch for each side: the
// scores, later what is turned back.
// Bound: issue slots, of which each of a scheduler's three warps takes a third; 11.5 MFLOP a chunk and head at N 128.
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
  alignas(16) float bias[2][Sh::kTurns ? Sh::R : 1][Sh::N];
  // sums over columns of P or over rows, of each warp
  float states[2][4][Sh::CT], passed[2][ROWS], own[ROWS], energy[4];

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
  static constexpr int kOnce = (kKept ? 2 : 0) * sizeof(Tile<ROWS, Sh::N>) + 2 * sizeof(Tile<P, Sh::N>) + 2 * sizeof(Scratch) + 16 * Sh::CT + 64;
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

// The warpgroup that makes tiles.
template <class Sh>
__device__ __forceinline__ void make_tiles(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Row = Rows<Sh, 2>;
  constexpr int CT = Sh::CT, R = Sh::R, NA = Sh::NA, kStages = GradientShared<Sh>::kStages;
  constexpr bool kKept = GradientShared<Sh>::kKept;
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units, width = min(P, int(a.P));
  const bool gated = a.z;
  const float plain = gated ? 0.f : 1.f;
  const Row row;
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + here.group * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + here.group * a.C_g;
  Step step, behind;
  for (int it = 0; it < items + (Sh::kTurns ? kStages : 0); ++it) {
    const int stage = it % kStages;
    auto& to = s.stage[stage];
    if constexpr (Sh::kTurns)
      if (it >= kStages) {  // the angles' gradients of the head that had the stage
        const int unit = here.first + behind.i, h = here.blocks == 1 ? unit : unit / 2, start_ = (here.chunk + behind.j) * CT;
        const int live = seq.length - start_, t = int(threadIdx.x) % 128;
        const long long token = seq.token + start_;
        const bool each = a.angle_heads > 1;
        const long long place = each ? unit * a.tokens + token : (here.group * a.splits + here.split) * a.tokens + token;
        angle_gradients<Sh>(
            s.scratch[0].template as<typename GradientShared<Sh>::Turned>(), s.scratch[1].template as<typename GradientShared<Sh>::Turned>(),
            at<const float>(a.angles) + seq.row * a.a_b + (seq.first + start_) * a.a_s + h * a.a_h, int(a.a_s), to.decays,
            at<float>(a.dangle_sum) + place * NA, each || behind.i == 0,
            at<float>(a.total) + ((here.span * a.every + behind.j) * a.H * here.blocks + unit) * NA, s.by_token, live);
        wait_at(kTurning, 128);
        if (t < CT && t < live) {
          constexpr int kWarps = NA / 2 * (256 / NA < CT ? 256 / NA : CT) / 32;
          float of_token = 0.f;
#pragma unroll
          for (int n = 0; n < kWarps; ++n) of_token += s.by_token[n][t];
          at<float>(a.ddt_turned)[unit * a.tokens + token + t] = PI * of_token;
        }
        behind.next(units);
        if (it >= items) continue;
      }
    const int j = step.j, unit = here.first + step.i, h = here.blocks == 1 ? unit : unit / 2, p_first = (unit - h * here.blocks) * P;
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_;
    const long long token = h * a.tokens + seq.token + start_, in_row = seq.first + start_;
    const bool first_unit = step.i == 0;
    step.next(units);
    typename Row::Bias bias;
    Angles<Sh> angle;
    float base = 0.f;
    if constexpr (Sh::kTurns) {
      angle.load(
          at<const float>(a.angles) + seq.row * a.a_b + in_row * a.a_s + h * a.a_h, int(a.a_s), at<const float>(a.DT) + token, live);
      if (Angles<Sh>::mine())
        base = at<const float>(a.bases)[((here.span * a.every + j) * a.H + h) * NA + Angles<Sh>::index()];
    }
    if (it >= kStages) wait_at(kEmpty + stage, 384);
    if constexpr (!kKept) {
      copy_rows<Sh>(to.q, C + start_ * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh>(to.k, B + start_ * a.B_s, int(a.B_s), int(a.B_r), live);
    } else if (first_unit) {
      wait_at(kTurning, 128);  // the chunk before is turned
      copy_rows<Sh>(s.kept.C, C + start_ * a.C_s, int(a.C_s), int(a.C_r), live);
      copy_rows<Sh>(s.kept.B, B + start_ * a.B_s, int(a.B_s), int(a.B_r), live);
    }
    copy_tokens<Sh>(to.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live, width);
    copy_tokens<Sh>(to.dy, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live, width);
    if (gated)
      copy_tokens<Sh>(to.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live, width);
    copy_decays<Sh>(to.decays, a, token, live);
    copy_parameters<Sh, 128>(to.parameters, a, h, p_first, width);
    if constexpr (Sh::kTurns)
#pragma unroll
      for (int i = threadIdx.x % 128 * 4; i < R * Sh::N; i += 512) {
        copy16(&to.bias[0][0][i], at<const float>(a.C_bias) + h * R * Sh::N + i, true);
        copy16(&to.bias[1][0][i], at<const float>(a.B_bias) + h * R * Sh::N + i, true);
      }
    commit();
    if constexpr (Sh::kTurns) angle.turn(to.turns, base);
    wait_copies();
    wait_at(kTurning, 128);
    if constexpr (Sh::kTurns) row.load(bias, to.bias[row.tile][0]);
    auto& turned = row.tile ? to.k : to.q;
    if constexpr (kKept)
      row.turn(turned, row.tile ? s.kept.B : s.kept.C, bias, to.turns);
    else
      row.turn(turned, turned, bias, to.turns);
#pragma unroll
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
#pragma unroll
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

// One of the two that multiply: what reads, or what writes. Both are the same code, so that it is fetched once.
template <class Sh>
__device__ __forceinline__ void multiply(const Arguments& a, GradientShared<Sh>& s, const Place& here, const bool reads) {
  using T = typename Sh::T;
  using Two = Pair<T>;
  using Shared = GradientShared<Sh>;
  constexpr int CT = Sh::CT, R = Sh::R, TB = Sh::TB, N = Sh::N, NA = Sh::NA, EIGHTS = Sh::EIGHTS;
  constexpr int kStages = Shared::kStages, kWide = N < 128 ? N : 128;
  const int side = reads ? 0 : 1;
  const float sign = reads ? 1.f : -1.f;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 4, col = lane % 4 * 2;
  const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units, all_p = int(a.P), width = min(P, all_p), H = int(a.H), U = H * here.blocks;
  const bool gated = a.z;
  auto& scratch = s.scratch[side];
  auto& scores = scratch.template as<Tile<ROWS, ROWS>>();
  auto& turned = scratch.template as<typename GradientShared<Sh>::Turned>();
  const auto& state = reads ? s.S : s.G;
  const auto fetch = [&](const Step& step) {
    const long long from = ((long long)(blockIdx.y * int(a.every) + step.j) * U + here.first + step.i) * int(sizeof(s.S));
    s.states.expect(2 * sizeof(s.S));
    s.states.copy(&s.S, at<const char>(a.states) + from, sizeof(s.S));
    s.states.copy(&s.G, at<const char>(a.carried) + from, sizeof(s.G));
  };
  if (threadIdx.x == 0) fetch({});

  float sum[N / 8][4];  // of C's or B's gradient
  Step step;
  for (int it = 0; it < items; ++it) {
    const int j = step.j, unit = here.first + step.i, h = here.blocks == 1 ? unit : unit / 2, p_first = (unit - h * here.blocks) * P;
    const bool first_unit = step.i == 0, last_unit = step.i + 1 == units;
    step.next(units);
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_, stage = it % kStages;
    const long long token = seq.token + start_, in_row = seq.first + start_, of_unit = unit * a.tokens + token;
    auto& in = s.stage[stage];
    const auto& decays = in.decays;
    const auto &rows = reads ? in.q : in.k, &others = reads ? in.k : in.q;
    const Tile<ROWS, P> &rows_p = reads ? in.dys : in.v(), &others_p = reads ? in.v() : in.dys;
    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };
    if (first_unit)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][e] = 0.f;

    wait_at(kFull + stage, 384);
    const float end = decays.L[CT - 1];
    unsigned dS[4][4];
    float scale[2];  // of the rows of dq or dk
    const int mine[2] = {p[0] % CT, p[1] % CT};  // the rows' tokens
    {
      float m[ROWS / 8][4], dm[ROWS / 8][4];
      start();
      across<T, N>(m, rows, others), across<T, P>(dm, rows_p, others_p);
      finish();
      if (Sh::kTurns && it) wait_at(kRead, 384);  // what was turned back for the head before

      // scores and dm through the decays, by rows
      const float l[2] = {decays.L[mine[0]], decays.L[mine[1]]};
      const float w[2] = {reads ? 1.f : decays.w[mine[0]], reads ? 1.f : decays.w[mine[1]]};
      const float own[2] = {own_weight(decays, mine[0]), own_weight(decays, mine[1])};
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[e] = exp_(reads ? l[e] : end - l[e]) * w[e];
      float passed[2] = {}, owned[2] = {};  // what pairs have of L's gradient, or w's; own's
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        const float2 L = *reinterpret_cast<const float2*>(&decays.L[i * 8 + col]);
        float2 weight = *reinterpret_cast<const float2*>(&decays.w[i * 8 + col]);
        if (!reads) weight = {1.f, 1.f};
        float decay[4], mix[4], same[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int d = mine[e / 2] - i * 8 - col - e % 2;
          const float since = exp_((l[e / 2] - (e % 2 ? L.y : L.x)) * sign) * (e % 2 ? weight.y : weight.x);
          decay[e] = (reads ? d : -d) > 0 ? since : 0.f, same[e] = d == 0 ? 1.f : 0.f;
          mix[e] = same[e] * own[e / 2] + decay[e] * w[e / 2];
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &x = m[r * EIGHTS + i][e], &dx = dm[r * EIGHTS + i][e];
            const float both = x * dx;
            passed[e / 2] += both * decay[e], owned[e / 2] += both * same[e];
            x *= mix[e], dx *= mix[e];
          }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float of_row = over_quad(passed[e]), of_own = over_quad(owned[e]);
        if (lane % 4 == 0) {
          in.passed[side][p[e]] = of_row;
          if (reads) in.own[p[e]] = of_own;
        }
      }
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) scores.put(p[e], n * 8 + col, Two::pack(m[n][2 * e], m[n][2 * e + 1]));
#pragma unroll
      for (int c = 0; c < 4; ++c) operand<T>(dS[c], dm[2 * c], dm[2 * c + 1]);
    }
    s.states.wait(it % 2);
    if (!reads) {  // <S, G>, the diagonal of a product
      float both[P / 8][4], energy = 0.f;
      start();
      across<T, N>(both, s.S, s.G);
      finish();
#pragma unroll
      for (int n = 0; n < P / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) energy += n * 8 + col + e % 2 == p[e / 2] ? both[n][e] : 0.f;
#pragma unroll
      for (int d = 16; d; d /= 2) energy += __shfl_xor_sync(~0u, energy, d);
      if (lane == 0) in.energy[warp] = energy;
    }

    float y[ROWS / 8][4];
    start();
    across<T, N>(y, state, rows);
    finish();
    // y and dv of the states, by columns; what tokens read of S, write to G
    {
      struct Factors {
        float2 state, all;  // of what is read or written of the state; with the weight of what is written
      };
      const auto factors_of = [&](int i) {
        const float2 L = *reinterpret_cast<const float2*>(&decays.L[i * 8 + col]);
        const float2 w = *reinterpret_cast<const float2*>(&decays.w[i * 8 + col]);
        const float2 f = {exp_(reads ? L.x : end - L.x), exp_(reads ? L.y : end - L.y)};
        return Factors{f, {f.x * (reads ? 1.f : w.x), f.y * (reads ? 1.f : w.y)}};
      };
      constexpr int kFold = R == 1 ? 8 : EIGHTS * 2;  // sums for tokens; without ranks of a half of them at a time
      Factors factors[R == 1 ? 1 : EIGHTS];
      float through[kFold];
      if constexpr (R > 1)
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) factors[i] = factors_of(i);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        unsigned from[4];
        rows_p.columns(from, b * 16, p0);
        if (b == 0 || (R == 1 && b == 2))
#pragma unroll
          for (int i = 0; i < kFold; ++i) through[i] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = (2 * b + half) % EIGHTS, i = eight * 2 % kFold;
          const Factors f = R == 1 ? factors_of(eight) : factors[eight % (R == 1 ? 1 : EIGHTS)];
#pragma unroll
          for (int e = half; e < 4; e += 2) {
            const float2 v = Two::unpack(from[e]);
            float* o = &y[2 * b + half][e / 2 * 2];
            through[i] += v.x * o[0], through[i + 1] += v.y * o[1];
            o[0] *= f.all.x, o[1] *= f.all.y;
          }
          if (R == 1) through[i] *= f.state.x, through[i + 1] *= f.state.y;
        }
        if (b == 3 || (R == 1 && b == 1)) {
          if constexpr (R > 1)
#pragma unroll
            for (int i = 0; i < EIGHTS; ++i) through[2 * i] *= factors[i].state.x, through[2 * i + 1] *= factors[i].state.y;
          const float all = fold(through);
          const int i = (R == 1 ? b / 2 * 8 : 0) + folded<kFold>();
          if (row % (8 / kFold) == 0) in.states[side][warp][i / 2 * 8 + col + i % 2] = all;
        }
      }
    }
    publish();
    wait_at(kProducts + side, 128);

    {
      unsigned left[4][4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        unsigned from[4];
        others_p.columns(from, c * 16, p0);
        left[c][0] = from[0], left[c][1] = from[2], left[c][2] = from[1], left[c][3] = from[3];
      }
      start();
#pragma unroll
      for (int c = 0; c < 4; ++c) Product<T, ROWS>::template held<kAcross>(y, left[c], scores.descriptor(0, c * 16));
      finish();
    }
    const int t = int(threadIdx.x) % 128;
    if (t < CT && t < live) {
      const float through = in.states[side][0][t] + in.states[side][1][t] + in.states[side][2][t] + in.states[side][3][t];
      float rows_[2] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        rows_[0] += in.passed[side][r * CT + t];
        if (reads) rows_[1] += in.own[r * CT + t];
      }
      if (reads) {
        at<float>(a.READ)[of_unit + t] = through;
        at<float>(a.PAIRS)[of_unit + t] = rows_[0];
        at<float>(a.DOWN)[of_unit + t] = rows_[1];
      } else {
        at<float>(a.WRITE)[of_unit + t] = through;
        at<float>(a.DW)[of_unit + t] = rows_[0] + through;
        if (t == 0)
          at<float>(a.energy)[(here.span * a.every + j) * U + unit] =
              exp_(end) * (in.energy[0] + in.energy[1] + in.energy[2] + in.energy[3]);
      }
    }
    const long long of_tokens = ((seq.row * a.S + in_row) * H + h) * all_p + p_first;
    const long long of_ranks = ((long long)blockIdx.y * H + h) * R * all_p + p_first;
    if (reads) {  // the gates
      if (gated || Sh::kRanks) {
        float parts[4 * R] = {};  // of phi [R][2], of zeta / phi
        const float plain = gated ? 0.f : 1.f;  // without gates z is 0
        float through[R][2], zeta[R][2], both[R][2];  // psi D, zeta, zeta phi
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            through[r][e] = in.parameters.skip[p[e]] * parameter(in.parameters.psi, r, e);
            zeta[r][e] = parameter(in.parameters.zeta, r, e), both[r][e] = zeta[r][e] * parameter(in.parameters.phi, r, e);
          }
#pragma unroll
        for (int tb = 0; tb < TB; ++tb) {
          unsigned xs[4], zs[4] = {}, ds[4];
          in.x.columns(xs, tb * 16, p0);
          in.dy.columns(ds, tb * 16, p0);
          if (gated) in.z.columns(zs, tb * 16, p0);
          float2 dz[4] = {};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 x = Two::unpack(xs[e]), z = Two::unpack(zs[e]), dy = Two::unpack(ds[e]);
#pragma unroll
            for (int b = tb; b < 4; b += TB) {
              const int r = Sh::rank(2 * b + e % 2);
              const float* o = &y[2 * b + e % 2][e / 2 * 2];
              const float skip = through[r][e / 2], wide = zeta[r][e / 2];
              const float2 of_gate = {dy.x * (o[0] + skip * x.x), dy.y * (o[1] + skip * x.y)};
              const float2 gate = {z.x * wide, z.y * wide}, open = {sigmoid(gate.x), sigmoid(gate.y)};
              const float2 silu = {gate.x * open.x + plain, gate.y * open.y + plain};
              const float2 back = {of_gate.x * (open.x + silu.x - silu.x * open.x), of_gate.y * (open.y + silu.y - silu.y * open.y)};
              if constexpr (Sh::kRanks) {
                parts[2 * r + e / 2] += of_gate.x * silu.x + of_gate.y * silu.y;
                parts[2 * R + 2 * r + e / 2] += back.x * z.x + back.y * z.y;
              }
              dz[e].x += back.x * both[r][e / 2], dz[e].y += back.y * both[r][e / 2];
            }
          }
          if (CT < 16) both_halves(dz);
#pragma unroll
          for (int e = 0; e < 4; ++e) zs[e] = Two::pack(dz[e].x, dz[e].y);
          if (gated) in.z.put_columns(zs, tb * 16, p0);
        }
        if (gated) store_columns<Sh>(at<T>(a.dz) + of_tokens, H * all_p, in.z, p0, live, width);
        if constexpr (Sh::kRanks) {
#pragma unroll
          for (int i = 0; i < 2 * R; ++i) parts[2 * R + i] *= parameter(in.parameters.phi, i / 2, i % 2);
          over_row(parts);
          const bool of_phi = !(threadIdx.x & 2);
          const int i = over_row_first<4 * R>() % (2 * R), c = p0 + row + i % 2 * 8;
          float* to = at<float>(of_phi ? a.dphi : a.dzeta) + of_ranks + i / 2 * all_p + c;
#pragma unroll
          for (int n = 0; n < R; ++n) add(to + n / 2 * all_p + n % 2 * 8, parts[n], c + n % 2 * 8 < width && (gated || of_phi));
        }
      }
    } else {  // dx
      constexpr int kParts = (2 * R + 2 + 3) / 4 * 4;
      float parts[kParts] = {};  // of psi [R][2], of D [2]
      auto& out = scratch.template as<Tile<CT, P>>();
      wait_at(kProducts + side, 128);  // all are done with the scores
#pragma unroll
      for (int tb = 0; tb < TB; ++tb) {
        unsigned xs[4], packed[4];
        in.x.columns(xs, tb * 16, p0);
        float2 dx[4] = {};
#pragma unroll
        for (int b = tb; b < 4; b += TB) {
          unsigned ds[4];
          in.dys.columns(ds, b * 16, p0);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = Sh::rank(2 * b + e % 2);
            const float* o = &y[2 * b + e % 2][e / 2 * 2];
            const float2 x = Two::unpack(xs[e]), dy = Two::unpack(ds[e]);
            const float skip = in.parameters.skip[p[e / 2]], psi = parameter(in.parameters.psi, r, e / 2);
            const float2 dv = {o[0] + skip * dy.x, o[1] + skip * dy.y};
            const float into = dy.x * x.x + dy.y * x.y;
            parts[2 * R + e / 2] += into * psi;
            if constexpr (Sh::kRanks) parts[2 * r + e / 2] += dv.x * x.x + dv.y * x.y;
            dx[e].x += dv.x * psi, dx[e].y += dv.y * psi;
          }
        }
        if (CT < 16) both_halves(dx);
#pragma unroll
        for (int e = 0; e < 4; ++e) packed[e] = Two::pack(dx[e].x, dx[e].y);
        out.put_columns(packed, tb * 16, p0);
      }
      store_columns<Sh>(at<T>(a.dx) + of_tokens, H * all_p, out, p0, live, width);
      over_row(parts);
#pragma unroll
      for (int n = 0; n < kParts / 4; ++n) {
        const int i = over_row_first<kParts>() + n, c = p0 + row + i % 2 * 8;
        const bool of_psi = Sh::kRanks && i < 2 * R, of_skip = a.D && i / 2 == R;
        float* to = of_psi ? at<float>(a.dpsi) + of_ranks + i / 2 * all_p : at<float>(a.dD) + ((long long)blockIdx.y * H + h) * all_p + p_first;
        add(to + c, parts[n], c < width && (of_psi || of_skip));
      }
    }

    float d[N / 8][4];  // of q or k
    start();
#pragma unroll
    for (int k = 0; k < P / 16; ++k)
#pragma unroll
      for (int n = 0; n < N; n += kWide) {
        auto& part = reinterpret_cast<float(&)[kWide / 8][4]>(d[n / 8]);
        k ? Product<T, kWide>::template shared<kAlong>(part, rows_p.descriptor(0, k * 16), state.descriptor(k * 16, n))
          : Product<T, kWide>::template shared<kAlong, 0>(part, rows_p.descriptor(0, 0), state.descriptor(0, n));
      }
    finish();
    if (lane == 0) {  // the last of eight warps fetches the next states
      __threadfence_block();
      if (atomicAdd(&s.done, 1) % 8 == 7 && it + 1 < items) fetch(step);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[n][e] *= scale[e / 2];
    start();
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int n = 0; n < N; n += kWide)
        Product<T, kWide>::template held<kAlong>(
            reinterpret_cast<float(&)[kWide / 8][4]>(d[n / 8]), dS[c], others.descriptor(c * 16, n));
    finish();
    wait_at(kProducts + side, 128);  // all are done with the scores, or have stored dx
    if constexpr (Sh::kTurns) {
      float2 back[2][NA / 8];
      turn_back<Sh>(d, p0, rows, in.turns, back);
      add_bias<Sh>(
          d, at<float>(reads ? a.dC_bias : a.dB_bias) + ((long long)blockIdx.y * U + unit) * (R < 4 ? 4 : R) * N, turned[p0]);
      put_turned<Sh>(turned, p0, back);
      arrive_at(kTurned, 384);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += d[n][e];
    arrive_at(kEmpty + stage, 384);
    if (last_unit) {
      const long long at_B = here.split * a.dB_split + seq.row * a.dB_b + in_row * a.dB_s + here.group * a.dB_g;
      const long long at_C = here.split * a.dC_split + seq.row * a.dC_b + in_row * a.dC_s + here.group * a.dC_g;
      store_rows<Sh>(
          sum, at<char>(reads ? a.dC : a.dB) + (a.splits > 1 ? 4 : 2) * (reads ? at_C : at_B), a.splits == 1,
          int(reads ? a.dC_s : a.dB_s), int(reads ? a.dC_r : a.dB_r), p0, live);
    }
  }
}

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(384, 1) gradient(const __grid_constant__ Arguments a) {
  using Sh = Shape<T, MODEL, R, N>;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<GradientShared<Sh>*>(bytes);
  const Place here = place<Sh>(a);
  if (here.chunks == 0) return;
  if (threadIdx.x == 0) s.states.make(), s.done = 0, s.here = here;
  publish();
  __syncthreads();
  if (threadIdx.x < 256) {
    take_registers<Sh::kTurns ? 200 : 216>();
    multiply<Sh>(a, s, s.here, __shfl_sync(~0u, threadIdx.x / 128, 0) == 0);  // known to be one for the warp
  } else {
    give_registers<Sh::kTurns ? 104 : 72>();
    make_tiles<Sh>(a, s, s.here);
  }
}

}  // namespace nam56r::ssd
