// What the indexer's kernels get, the order of their work, and which keys a query sees.
#pragma once

#include "hopper/device.cuh"

namespace nam56r::dsa {

struct Arguments {
  const int* cu;         // [n + 1], or null
  const float* weights;  // [B, S, H]; of 8-bit queries times their scales
  const float* scales;   // [B, S]: of 8-bit keys
  uint2* lists;          // [pieces here, QUERIES, capacity]: candidates, their scores as ordered() has them, and keys
  int2* counts;          // [pieces here, QUERIES]: a list's length, and what none of its top_k is below, as ordered() has it
  int* indices;          // [B, S, top_k]
  int* status;           // set to 1 where a score is NaN
  int batch, length, heads, sequences, top_k, capacity;
  int first, pieces;     // of this launch
};

struct Maps {
  TensorMap q, k;  // boxes of 64 columns
};

// A piece of work: some queries of a sequence. Those that see most come first.
struct Piece {
  int query, batch;
  __device__ Piece(const Arguments& a, int number, int queries)
      : query(((a.length + queries - 1) / queries - 1 - number / a.batch) * queries), batch(number % a.batch) {}
};

// The keys [first, end) that a query sees: its sequence's, up to itself.
struct Seen {
  int first, end;
};

__device__ inline Seen seen_by(const Arguments& a, int query) {
  int low = 0, high = a.cu ? a.sequences : 0;  // the last sequence that starts at the query or before, of those that aren't empty
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.cu[middle] <= query) low = middle;
    else high = middle - 1;
  }
  return {a.cu ? a.cu[low] : 0, query + 1};
}

}  // namespace nam56r::dsa
