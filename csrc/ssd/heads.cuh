// A head's tiles in `gradient`: where its block works, what shared memory holds, and the two warpgroups that fill it.
//
// make_angles copies x, z, dy, turns, decays and parameters; make_rows turns q and k and makes v and dys, a stage ahead. The
// copies are a stage more ahead where there is room. make_angles also has the angles' gradients of the head whose place it fills again.
#pragma once

#include "ssd/accumulators.cuh"

namespace nam56r::ssd {

struct Place {
  int sequence, group, split, blocks, chunk, chunks, first;  // the first chunk, how many; the first unit
  long long span;
  Sequence seq;

  __device__ int head(int unit) const { return blocks == 1 ? unit : unit / 2; }
};

template <class Sh>
struct GradientCopies {  // what is copied for a head
  Tile<Sh::CT, P> x, z, dy;
  Turns<Sh> turns;
  Decays<Sh> decays;
  Parameters<Sh> parameters;
};

template <class Sh>
struct GradientStage {  // what is made of it
  Tile<ROWS, Sh::N> q, k;
  Tile<ROWS, P> dys;
  Tile<Sh::kRanks ? ROWS : 8, P> scaled;

  __device__ auto& v(GradientCopies<Sh>& copies) {  // without ranks it is x
    if constexpr (Sh::kRanks) return scaled;
    else return copies.x;
  }
};

template <class Sh>
struct GradientSums {  // over a warp's columns of P, or over its rows, or over their columns
  float read[4][Sh::CT], written[4][Sh::CT], later[4][Sh::CT], pairs[ROWS], own[ROWS], energy[4];
};

// The scores, or dm, through the decays; and what is turned back of q, or of k: in the same place, or apart.
template <class Sh, bool kApart>
struct Scratch {
  Tile<ROWS, ROWS> tile;
  Turned<Sh> turned;
};
template <class Sh>
struct Scratch<Sh, false> {
  union {
    Tile<ROWS, ROWS> tile;
    Turned<Sh> turned;
  };
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
  static constexpr int kOnce =
      (kKept ? 2 : 0) * sizeof(Tile<ROWS, Sh::N>) + 2 * sizeof(Tile<P, Sh::N>) + 2 * sizeof(Scratch<Sh, false>) + 16 * Sh::CT + 256;
  static constexpr int kMade = sizeof(GradientStage<Sh>) + sizeof(GradientSums<Sh>), kCopied = sizeof(GradientCopies<Sh>);
  static constexpr int kRoom = 227 * 1024 - kOnce;
  static constexpr int kStages = 2 * (kMade + kCopied) > kRoom ? 1 : 2;
  static constexpr int kCopies = kStages * kMade + (kStages + 1) * kCopied > kRoom ? kStages : kStages + 1;
  static constexpr bool kApart = kStages * kMade + kCopies * kCopied + sizeof(Tile<ROWS, ROWS>) <= kRoom;
  GradientStage<Sh> stage[kStages];
  GradientCopies<Sh> copies[kCopies];
  Tile<P, Sh::N> S, G;
  Scratch<Sh, kApart> scores;
  Scratch<Sh, false> dS;
  GradientKept<Sh, kKept> kept;
  GradientSums<Sh> sums[kStages];
  float by_token[4][Sh::CT];
  Arrival states, copied[kCopies], left[kCopies];  // copies are there; the warps with N and P are done with them
  int done;
  Place here;  // not in registers, of which there are too few
};

// Where a block works in the segment from a span on; chunks is 0 where there is nothing.
template <class Sh>
__device__ inline Place place(const Arguments& a, long long segment) {
  Place p{};
  p.group = blockIdx.x / int(a.splits), p.split = blockIdx.x % int(a.splits), p.blocks = max(1, int(a.P) / P);
  p.first = p.group * int(a.heads_per_group) * p.blocks + p.split * int(a.units);
  long long of_sequence;
  if (a.cu) {
    p.span = segment + blockIdx.y;
    if (p.span >= a.spans) return p;
    p.sequence = at<const int>(a.sequence_of)[p.span];
    if (p.sequence >= a.sequences) return p;
    of_sequence = p.span - first_span(a, p.sequence);
  } else {
    p.sequence = blockIdx.y / int(a.segment_spans), of_sequence = segment + blockIdx.y % int(a.segment_spans);
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

// The warpgroup that makes q and k, v and dys.
template <class Sh>
__device__ __forceinline__ void make_rows(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Row = Rows<Sh, 2>;
  constexpr int CT = Sh::CT, R = Sh::R, N = Sh::N, kStages = GradientShared<Sh>::kStages, kCopies = GradientShared<Sh>::kCopies;
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units;
  const bool gated = a.z;
  const float plain = gated ? 0.f : 1.f;
  const Row row;
  const T* B = at<const T>(a.B) + seq.row * a.B_b + seq.first * a.B_s + here.group * a.B_g;
  const T* C = at<const T>(a.C) + seq.row * a.C_b + seq.first * a.C_s + here.group * a.C_g;
  Step step;
  for (int it = 0; it < items; ++it) {
    const int stage = it % kStages, unit = here.first + step.i, h = here.head(unit);
    const int start_ = (here.chunk + step.j) * CT, live = seq.length - start_;
    const bool first_unit = step.i == 0;
    auto& to = s.stage[stage];
    const auto& in = s.copies[it % kCopies];
    step.next(units);
    typename Row::Bias bias;
    typename Row::Coming coming;
    if constexpr (Sh::kTurns) coming.load(row, at<const float>(row.tile ? a.B_bias : a.C_bias) + h * R * N);
    const auto empty = [&] {
      if (it >= kStages) wait_at(kEmpty + stage, 384);
    };
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
    if constexpr (!GradientShared<Sh>::kKept) {
      empty();
      copy(to.q, to.k);
    } else {
      from = row.tile ? &s.kept.B : &s.kept.C;
      if (first_unit) {
        wait_at(kTurning, 128);  // the chunk before is turned
        copy(s.kept.C, s.kept.B);
      }
      empty();
    }
    s.copied[it % kCopies].wait(it / kCopies % 2);
    if constexpr (Sh::kTurns) coming.round(bias);
    row.template turn<1>(turned, *from, bias, in.turns);
#pragma unroll 1
    for (int n = 0; n < (CT * 8 + 127) / 128; ++n) {
      const int i = threadIdx.x % 128 + n * 128, t = i / 8, c = i % 8 * 8;
      if (CT * 8 < 128 && i >= CT * 8) break;
      const uint4 raw = get16(in.dy.unit(t, c));
      if (!Sh::kRanks && !gated) {
        put16(to.dys.unit(t, c), raw);
        continue;
      }
      float d[8], z[8], x[8];
      unpack8<T>(d, raw);
      unpack8<T>(z, gated ? get16(in.z.unit(t, c)) : uint4{});
      unpack8<T>(x, get16(in.x.unit(t, c)));
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        float gate[8], v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[e] = z[e];
        if constexpr (Sh::kRanks) {
          float psi[8], phi[8], zeta[8];
          load(zeta, &in.parameters.zeta[r][c]), load(psi, &in.parameters.psi[r][c]), load(phi, &in.parameters.phi[r][c]);
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

// The warpgroup that copies, and has the angles' gradients.
template <class Sh>
__device__ __forceinline__ void make_angles(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  constexpr int CT = Sh::CT, NA = Sh::NA, kCopies = GradientShared<Sh>::kCopies;
  const Sequence& seq = here.seq;
  const int units = int(a.units), items = here.chunks * units, H = int(a.H), width = min(P, int(a.P)), t = int(threadIdx.x) % 128;
  const bool gated = a.z;
  Step step, behind;
  for (int it = 0; it < items + (Sh::kTurns ? kCopies : 0); ++it) {
    auto& to = s.copies[it % kCopies];
    if constexpr (Sh::kTurns)
      if (it >= kCopies) {  // the angles' gradients of the head that had the place
        const int unit = here.first + behind.i, h = here.head(unit), start_ = (here.chunk + behind.j) * CT;
        const int live = seq.length - start_;
        const long long token = seq.token + start_;
        const bool each = a.angle_heads > 1;
        const long long place = each ? unit * a.tokens + token : (here.group * a.splits + here.split) * a.tokens + token;
        AngleGradients<Sh> angles;
        angles.load(at<const float>(a.angles) + seq.row * a.a_b + (seq.first + start_) * a.a_s + h * a.a_h, int(a.a_s), live);
        angles.sum(
            s.scores.turned, s.dS.turned, to.decays, at<float>(a.dangle_sum) + place * NA, each || behind.i == 0,
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
    const int j = step.j, unit = here.first + step.i, h = here.head(unit), p_first = (unit - h * here.blocks) * P;
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_;
    const long long token = h * a.tokens + seq.token + start_, in_row = seq.first + start_;
    step.next(units);
    if (it >= kCopies) s.left[it % kCopies].wait((it / kCopies - 1) % 2);
    copy_tokens<Sh>(to.x, at<const T>(a.x) + seq.row * a.x_b + in_row * a.x_s + h * a.x_h + p_first, int(a.x_s), live, width);
    copy_tokens<Sh>(to.dy, at<const T>(a.dy) + seq.row * a.dy_b + in_row * a.dy_s + h * a.dy_h + p_first, int(a.dy_s), live, width);
    if (gated)
      copy_tokens<Sh>(to.z, at<const T>(a.z) + seq.row * a.z_b + in_row * a.z_s + h * a.z_h + p_first, int(a.z_s), live, width);
    copy_decays<Sh>(to.decays, at<const float>(a.L) + token, int(a.H * a.tokens), live);
    copy_parameters<Sh, 128>(to.parameters, a, h, p_first, width);
    if constexpr (Sh::kTurns) copy_turns<Sh>(to.turns, at<const Turns<Sh>>(a.turns) + (blockIdx.y * a.every + j) * H + h);
    s.copied[it % kCopies].arrive_when_copied();
  }
}

}  // namespace nam56r::ssd
