// The gradients of all inputs, chunk by chunk, from the states S before and the gradients G of the states after each chunk.
//
// With v = x psi, dys = dy phi silu(z zeta) per rank, left = e^(L_end - L), and mix as in forward.cuh:
//   scores = q k^T, dm = dys v^T
//   y^T  = e^L S q^T      + v^T (scores * mix)^T       dq = e^L (dys S)    + (dm * mix) k
//   dv^T = left w (G k^T) + dys^T (scores * mix)       dk = left w (v G)   + (dm * mix)^T q
// A block has a group's heads (or some of them) and a span of chunks, and takes a chunk's heads one after the other, in four
// warpgroups that each have a part of the code. One copies what a head needs, up to three heads ahead, and has the angles'
// gradients of a head that is done; one makes the next head's tiles: turns q and k, makes v and dys. One has what is along N:
// the scores, dm, dq and dk, so the biases and C and B, whose sums over heads stay in registers, 2 [64, N]. One has what is
// along P: y, dv and <S, G>, so the gates, z and x. y and dv are transposed, so that a thread has all ranks of its tokens.
// Shared memory: q, k, dys and v of two heads (of one where N is 256); x, z, dy, turns, decays and parameters of one more; S
// and G, which lie in memory as wgmma reads them and are fetched whole by the last warp that is done with those before; the
// scores and dm through the decays, and what is turned back of q and of k; B and C where a rank has few tokens.
// Bound: latency and instruction fetches: 4 900 instructions a scheduler and head from 75 KiB of code; of the four warps on a
// scheduler that with N is busy. So loops stay loops where registers allow it. 11.5 MFLOP a chunk and head at N 128.
#pragma once

#include "ssd/heads.cuh"

namespace nam56r::ssd {

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

// A warp is done with a head's copies.
__device__ __forceinline__ void leave(Arrival& left) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) left.arrive();
}

// The warpgroup that has N: scores and dm, and from them the gradients of q and k, so of C and B, and of the biases.
template <class Sh>
__device__ __forceinline__ void along_n(const Arguments& a, GradientShared<Sh>& s, const Place& here) {
  using T = typename Sh::T;
  using Two = Pair<T>;
  constexpr int CT = Sh::CT, R = Sh::R, N = Sh::N, NA = Sh::NA, EIGHTS = Sh::EIGHTS;
  constexpr int kStages = GradientShared<Sh>::kStages, kCopies = GradientShared<Sh>::kCopies, kWide = N < 128 ? N : 128;
  constexpr bool kApart = GradientShared<Sh>::kApart;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, col = lane % 4 * 2, p0 = warp * 16;
  const int rows[2] = {p0 + row, p0 + row + 8}, mine[2] = {rows[0] % CT, rows[1] % CT};  // the thread's rows, their tokens
  const int units = int(a.units), items = here.chunks * units;
  auto &scores = s.scores.tile, &dS = s.dS.tile;

  float sum[2][N / 8][4] = {};  // of C's and B's gradients
  Step step;
  for (int it = 0; it < items; ++it) {
    const int j = step.j, unit = here.first + step.i, stage = it % kStages;
    const bool last_unit = step.i + 1 == units;
    step.next(units);
    const int start_ = (here.chunk + j) * CT, live = here.seq.length - start_;
    auto& in = s.stage[stage];
    auto& sums = s.sums[stage];
    auto& copies = s.copies[it % kCopies];
    const auto& decays = copies.decays;
    wait_at(kFull + stage, 384);
    float scale[2][2];  // of the rows of dq and dk
    {
      float m[ROWS / 8][4], dm[ROWS / 8][4];
      start();
      across<T, N>(m, in.q, in.k), across<T, P>(dm, in.dys, in.v(copies));
      close();
      const float end = decays.L()[CT - 1];
      const float l[2] = {decays.L()[mine[0]], decays.L()[mine[1]]};
      const float own[2] = {own_weight(decays, mine[0]), own_weight(decays, mine[1])};
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[0][e] = exp_(l[e]), scale[1][e] = exp_(end - l[e]) * decays.w()[mine[e]];
      struct {
        float since[4], weighed[4];
      } by[EIGHTS];
      const auto weigh = [&](int i) {
        const float2 L = *reinterpret_cast<const float2*>(&decays.L()[i * 8 + col]);
        const float2 w = *reinterpret_cast<const float2*>(&decays.w()[i * 8 + col]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float since = exp_(l[e / 2] - (e % 2 ? L.y : L.x));
          by[i].since[e] = mine[e / 2] > i * 8 + col + e % 2 ? since : 0.f;
          by[i].weighed[e] = by[i].since[e] * (e % 2 ? w.y : w.x);
        }
      };
      constexpr bool kMeanwhile = EIGHTS <= 2;  // while the products run, where there are registers
      if (kMeanwhile)
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) weigh(i);
      settle();
      if (kApart && it) wait_at(kScoresRead, 256);  // by the other warpgroup
      if (Sh::kTurns && it) wait_at(kRead, 256);  // what was turned back for the head before

      // scores and dm through the decays
      float pairs[2] = {}, owned[2] = {}, later[EIGHTS * 2] = {};
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        if (!kMeanwhile) weigh(i);
        const auto &decay = by[i].since, &weighed = by[i].weighed;
        float mix[4], same[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          same[e] = mine[e / 2] == i * 8 + col + e % 2 ? 1.f : 0.f;
          mix[e] = same[e] * own[e / 2] + weighed[e];
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
        if (lane % 4 == 0) sums.pairs[rows[e]] = of_row, sums.own[rows[e]] = of_own;
      }
      constexpr int kFold = EIGHTS * 2 < 8 ? EIGHTS * 2 : 8;
#pragma unroll
      for (int from = 0; from < EIGHTS * 2; from += kFold) {
        float part[kFold];
#pragma unroll
        for (int i = 0; i < kFold; ++i) part[i] = later[from + i];
        const float all = fold(part);
        const int i = from + folded<kFold>();
        if (row % (8 / kFold) == 0) sums.later[warp][i / 2 * 8 + col + i % 2] = all;
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
      const Tile<ROWS, P>& by = side ? in.v(copies) : in.dys;
      const auto& state = side ? s.G : s.S;
      auto& turned = side ? s.dS.turned : s.scores.turned;
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
      else if (!kApart) wait_at(kScoresRead, 256);
      if constexpr (Sh::kTurns) {
        float2 back[2][NA / 8];
        turn_back<Sh>(d, p0, tile, copies.turns, back);
        add_bias<Sh>(
            d, at<float>(side ? a.dB_bias : a.dC_bias) + blockIdx.y * a.sums + unit * (R < 4 ? 4 : R) * N,
            turned[p0]);
        put_turned<Sh>(turned, p0, back);
      }
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[side][n][e] += d[n][e];
    }
    if constexpr (Sh::kTurns) arrive_at(kTurned, 256);
    arrive_at(kEmpty + stage, 384);
    leave(s.left[it % kCopies]);
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
  constexpr int CT = Sh::CT, R = Sh::R, TB = Sh::TB, N = Sh::N, EIGHTS = Sh::EIGHTS;
  constexpr int kStages = GradientShared<Sh>::kStages, kCopies = GradientShared<Sh>::kCopies;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 4, col = lane % 4 * 2;
  const int p0 = warp * 16, p[2] = {p0 + row, p0 + row + 8};
  const int units = int(a.units), items = here.chunks * units, all_p = int(a.P), width = min(P, all_p), H = int(a.H), U = H * here.blocks;
  const bool gated = a.z;
  const float plain = gated ? 0.f : 1.f;  // without gates z is 0
  const auto& scores = s.scores.tile;
  if (threadIdx.x == 128) fetch_states<Sh>(a, s, here, {});

  Step step;
  for (int it = 0; it < items; ++it) {
    const int j = step.j, unit = here.first + step.i, h = here.head(unit), p_first = (unit - h * here.blocks) * P;
    step.next(units);
    const Sequence& seq = here.seq;
    const int start_ = (here.chunk + j) * CT, live = seq.length - start_, stage = it % kStages, t = int(threadIdx.x) % 128;
    const long long token = seq.token + start_, in_row = seq.first + start_, of_unit = unit * a.tokens + token;
    auto& in = s.stage[stage];
    auto& sums = s.sums[stage];
    auto& copies = s.copies[it % kCopies];
    const auto& decays = copies.decays;
    const auto parameter = [&](const auto& of, int r, int e) { return Sh::kRanks ? of[r][p[e]] : 1.f; };

    wait_at(kFull + stage, 384);
    s.states.wait(it % 2);
    float y[ROWS / 8][4], dv[ROWS / 8][4];
    const float end = decays.L()[CT - 1];
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
      energy = over_warp(energy);
      if (lane == 0) sums.energy[warp] = energy;
    }
    // what tokens read of S and write to G, before y and dv take their decays
    unsigned dys[4][4], v[4][4];  // transposed, as A operands
    {
      constexpr int kFold = R == 1 ? 8 : EIGHTS * 2;  // sums for tokens; without ranks of a half of them at a time
      float read[kFold], written[kFold];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        in.dys.operand_columns(dys[b], b * 16, p0), in.v(copies).operand_columns(v[b], b * 16, p0);
        if (b == 0 || (R == 1 && b == 2))
#pragma unroll
          for (int i = 0; i < kFold; ++i) read[i] = 0.f, written[i] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = (2 * b + half) % EIGHTS, i = eight * 2 % kFold;
          const float2 L = *reinterpret_cast<const float2*>(&decays.L()[eight * 8 + col]);
          const float2 w = *reinterpret_cast<const float2*>(&decays.w()[eight * 8 + col]);
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
          if (row % (8 / kFold) == 0) sums.read[warp][token_] = of_read, sums.written[warp][token_] = of_written;
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
      for (int r = 0; r < R; ++r) of_pairs += sums.pairs[r * CT + t], of_own += sums.own[r * CT + t];
      const float written = sum(sums.written);
      at<float>(a.PAIRS)[of_unit + t] = of_pairs, at<float>(a.DOWN)[of_unit + t] = of_own;
      at<float>(a.READ)[of_unit + t] = sum(sums.read), at<float>(a.WRITE)[of_unit + t] = written;
      at<float>(a.DW)[of_unit + t] = sum(sums.later) + written;
      if (t == 0 && here.chunk + j)  // that of a sequence's first chunk has `walk`
        at<float>(a.energy)[(here.span * a.every + j) * U + unit] =
            exp_(end) * (sums.energy[0] + sums.energy[1] + sums.energy[2] + sums.energy[3]);
    }

    // gates, and sums over ranks and tokens; dz leaves through z's place, dx through dy's
    constexpr int kInto = (2 * R + 2 + 3) / 4 * 4;
    float gates[4 * R] = {}, into[kInto] = {};  // of phi [R][2], of zeta / phi; of psi, of D [2]
#pragma unroll
    for (int tb = 0; tb < TB; ++tb) {
      unsigned xs[4], zs[4] = {}, ds[4];
      copies.x.columns(xs, tb * 16, p0);
      copies.dy.columns(ds, tb * 16, p0);
      if (gated) copies.z.columns(zs, tb * 16, p0);
      float2 dz[4] = {}, dx[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 x = Two::unpack(xs[e]), z = Two::unpack(zs[e]), dy = Two::unpack(ds[e]);
        const float skip = copies.parameters.skip[p[e / 2]];
#pragma unroll
        for (int b = tb; b < 4; b += TB) {
          const int r = Sh::rank(2 * b + e % 2);
          const float psi = parameter(copies.parameters.psi, r, e / 2), zeta = parameter(copies.parameters.zeta, r, e / 2);
          const float phi = parameter(copies.parameters.phi, r, e / 2), through = skip * psi, both = zeta * phi;
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
      if (gated) copies.z.put_columns(zs, tb * 16, p0);
      copies.dy.put_columns(ds, tb * 16, p0);
    }
    const long long of_tokens = ((seq.row * a.S + in_row) * H + h) * all_p + p_first;
    if (gated) store_columns<Sh>(at<T>(a.dz) + of_tokens, H * all_p, copies.z, p0, live, width);
    store_columns<Sh>(at<T>(a.dx) + of_tokens, H * all_p, copies.dy, p0, live, width);
    const long long of_ranks = blockIdx.y * a.sums + h * R * all_p + p_first;
    if constexpr (Sh::kRanks) {
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) gates[2 * R + i] *= parameter(copies.parameters.phi, i / 2, i % 2);
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
      float* to = of_psi ? at<float>(a.dpsi) + of_ranks + i / 2 * all_p : at<float>(a.dD) + blockIdx.y * a.sums + h * all_p + p_first;
      add(to + c, into[n], c < width && (of_psi || of_skip));
    }
    arrive_at(kEmpty + stage, 384);
    leave(s.left[it % kCopies]);
  }
}

template <class Sh>
struct Registers {  // of the warpgroups' threads; without ranks there are more angles a thread, and smaller rows
  static constexpr int kN = 240, kP = 144, kRows = Sh::R == 1 ? 56 : 72, kAngles = 128 - kRows;
};

template <typename T, int MODEL, int R, int N>
__global__ void __launch_bounds__(512, 1) gradient(const __grid_constant__ Arguments a, const __grid_constant__ Maps maps) {
#if NAM56R_HOPPER
  using Sh = Shape<T, MODEL, R, N>;
  extern __shared__ __align__(1024) char bytes[];
  auto& s = *reinterpret_cast<GradientShared<Sh>*>(bytes);
  const Place here = place<Sh>(a, a.segment);
  release_next();
  if (here.chunks == 0) return;
  if (threadIdx.x == 0) s.states.make(), s.done = 0, s.here = here;
  if (threadIdx.x < GradientShared<Sh>::kCopies) s.copied[threadIdx.x].make(128), s.left[threadIdx.x].make(8);
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
#endif
}

}  // namespace nam56r::ssd
