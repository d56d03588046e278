// What every kernel of the scan gets: addresses and sizes, in the order of FIELDS in kernels/ssd/cuda.py; maps are made from them.
#pragma once

#include "hopper/device.cuh"

namespace nam56r::ssd {

struct Arguments {
  void *x, *B, *C, *z, *dy;
  void *y, *dx, *dB, *dC, *dz;
  void *L, *W, *OWN, *DT, *angles, *B_bias, *C_bias, *D, *psi, *zeta, *phi;
  void *state, *angle;
  void *cu, *first, *sequence_of;
  void *saved, *bases, *final, *final_k, *final_v, *final_angle;
  void *turns, *next_turns, *states, *carried, *energy, *dfinal, *dstate;
  void *READ, *PAIRS, *WRITE, *DOWN, *DW, *dB_bias, *dC_bias, *dpsi, *dzeta, *dphi, *dD;
  void *ddt_turned, *dangle_sum, *total;
  long long S, tokens, H, P, heads_per_group, G, spans, sequences, every, units, splits, angle_heads, d_h, d_p, save;
  long long segment, segment_spans, segments, sums;  // sums: how far apart are those of a segment's places
  long long x_b, x_s, x_h, B_b, B_s, B_r, B_g, C_b, C_s, C_r, C_g, z_b, z_s, z_h, dy_b, dy_s, dy_h, a_b, a_s, a_h;
  long long dB_b, dB_s, dB_r, dB_g, dB_split, dC_b, dC_s, dC_r, dC_g, dC_split;
};

// A box may reach past a chunk's end, into another sequence.
struct Maps {
  TensorMap B, C;  // [batch, rank, token, group, N], boxes [1, R, CT, 1, 64]
  TensorMap x, z;  // [batch, 1, token, head, P], boxes [1, 1, CT, 1, 64]
};

template <typename T>
__device__ inline T* at(void* address) {
  return static_cast<T*>(address);
}

// Where a sequence lies: its row of the batch, its first token there and among all tokens, its length.
struct Sequence {
  long long row, first, token;
  int length;
};

__device__ inline Sequence sequence(const Arguments& a, int number) {
  if (!a.cu) return {number, 0, number * a.S, int(a.S)};
  const int* cu = at<const int>(a.cu);
  return {0, cu[number], cu[number], cu[number + 1] - cu[number]};
}

__device__ inline long long first_span(const Arguments& a, int number) {
  return a.cu ? at<const int>(a.first)[number] : number * a.spans;
}

}  // namespace nam56r::ssd
