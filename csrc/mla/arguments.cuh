// What every kernel of attention gets, and which keys a row sees.
//
// A row is a query of a head. `packed` heads lie in the rows of a tile, row = token * packed + head: all of them where they share
// key and value, one where each has its own; the `apart` heads that then remain are blocks' own.
#pragma once

#include "hopper/device.cuh"

namespace nam56r::mla {

struct Arguments {
  const int* cu;      // [n + 1], or null
  float* lse;         // [B, S, H], natural logarithms
  void* out;          // [B, S, H, VALUE], dense
  const void* rest;   // the same: what out's rounding lost, in 16 bits; backward, or forward where it will be asked for
  const void* dout;   // the same
  const float* dlse;  // [B, S, H], or null
  float* facts;       // [2, B, apart, padded]: log2 of a row's denominator; scale (dout (out + rest) - dlse). Infinite, zero past the last
  int2* seen;         // [padded]: the keys that a row sees
  int* taken;         // how many pieces of work are taken, from 0
  float* partial;     // of dk: [splits, B, T, KEY] where the value is in the key, else of the rope key [B, T, H, ROPE]
  int queries, keys, packed, apart, batch, sequences;  // S, T
  int offset, causal, padded, splits, together;
  float scale;
};

// Boxes of 64 columns. The dimensions: column, row or key, head apart, batch.
struct Maps {
  TensorMap q, nope, rope, v, out, rest, dout, dq, dnope, dv;
};

// The keys [first, end) that a token sees; both rise with the token.
struct Seen {
  int first, end;
};

__device__ inline Seen seen_by(const Arguments& a, int token) {
  int first = 0, end = a.keys;
  if (a.cu) {
    int low = 0, high = a.sequences;  // the last sequence that starts at the token or before, of those that aren't empty
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (a.cu[middle] <= token) low = middle;
      else high = middle - 1;
    }
    first = a.cu[low], end = a.cu[min(low + 1, a.sequences)];
  }
  if (a.causal) end = min(end, token + a.offset + 1);
  return {first, max(first, end)};
}

// The tokens [first, end) that see any of the keys [low, high).
__device__ inline Seen seeing(const Arguments& a, int low, int high) {
  int first = 0, end = a.queries;
  high = min(high, a.keys);
  if (a.cu) {
    first = low, end = high;  // every key's own token sees it; the others are of its sequence
    int at = 0, top = a.sequences;
    while (at < top) {
      const int middle = (at + top + 1) / 2;
      if (a.cu[middle] <= high - 1) at = middle;
      else top = middle - 1;
    }
    end = a.cu[min(at + 1, a.sequences)];
    if (!a.causal) first = seen_by(a, low).first;
  } else if (a.causal) {
    first = max(0, low - a.offset);
  }
  return {first, max(first, end)};
}

}  // namespace nam56r::mla
