// What the kernels of M²RNN read: their arguments, where a sequence's chunks lie, and a chunk's inputs on their way into
// shared memory.
#pragma once

#include "m2rnn/device.cuh"

namespace nam56r::m2rnn {

// Element [b, s, h, i] is data[b * batch + s * row + h * head + i].
struct Rows {
  const void* data;
  long long batch, row, head;
  bool vector;  // every 8 elements from a row's first on lie together in 16 (fp32: 32) aligned bytes, or not at all
};

struct Inputs {
  Rows q, k, v;               // [B, S, Hq, K], [B, S, Hk, K], [B, S, H, V], of the kernel's element type
  Rows forget;                // [B, S, H], fp32
  const float* weight;        // [H, V, V]
  const int* cu_seqlens;      // [n + 1]; null: n = B sequences of S rows
  int length, heads, sequences, keys;  // S, H, n, K
  int heads_a_query, heads_a_key;      // H / Hq, H / Hk
};

struct Sequence {
  int index, begin, length;
  long long batch, chunk;  // its batch row; its first chunk among those of all sequences
  int chunks;
};

// Chunks of packed sequences are numbered without counting them: sequence n's begin at begin / C + n, so that a few
// numbers stay unused. Bad cu_seqlens give wrong numbers, but no access outside of the tensors: every bound is clamped.
__device__ inline Sequence sequence_number(const Inputs& in, int index, int chunk) {
  Sequence s{index, 0, in.length, index};
  if (in.cu_seqlens) {
    s.begin = min(max(in.cu_seqlens[index], 0), in.length);
    s.length = min(max(in.cu_seqlens[index + 1], s.begin), in.length) - s.begin;
    s.batch = 0;
    s.chunk = s.begin / chunk + index;
  } else {
    s.chunk = (long long)index * ((in.length + chunk - 1) / chunk);
  }
  s.chunks = (s.length + chunk - 1) / chunk;
  return s;
}

constexpr int kUnit = 2;  // chunks that `products` takes together, a unit

// The last sequence that starts(index) holds for; it holds for the first, and for none after one that it doesn't hold for.
template <typename F>
__device__ inline int last_sequence(const Inputs& in, F starts) {
  int low = 0, high = in.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (starts(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The sequence that a chunk's number belongs to; its `chunks` may end before that number.
__device__ inline Sequence sequence_of_chunk(const Inputs& in, long long number, int chunk) {
  if (!in.cu_seqlens) return sequence_number(in, int(number / max((in.length + chunk - 1) / chunk, 1)), chunk);
  const auto starts = [&](int index) { return in.cu_seqlens[index] / chunk + index <= number; };
  return sequence_number(in, last_sequence(in, starts), chunk);
}

// A chunk's vectors in shared memory, k or q over the rows, v or dy over the columns. The pitch spreads 8 steps over the
// banks.
template <typename T, int N, int C> struct alignas(16) Vectors { T x[C][N + 16 / sizeof(T)]; };
template <int C> struct Forgets { float x[C]; };

// 16 neighbouring elements, zero from `count` on, in the registers of one thread.
template <typename T>
struct Sixteen {
  static constexpr int kAccess = 16 / sizeof(T);
  uint4 words[sizeof(T)];

  __device__ void load(const T* from, int count, bool vector) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); ++i) words[i] = {0, 0, 0, 0};
    if (vector) {
#pragma unroll
      for (int i = 0; i < int(sizeof(T)); ++i)
        if (i * kAccess < count) words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    } else if (count > 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const T x = i < count ? from[i] : T{};
        memcpy(reinterpret_cast<char*>(words) + i * sizeof(T), &x, sizeof(T));
      }
    }
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
  }
};

// A chunk's inputs on their way from global to shared memory, in the registers of `kThreads` threads: a thread takes 16
// elements of one step, of one of two tensors. Steps past the sequence's end get f = 1 and zeros, which leave state and
// gradient as they are.
template <typename T, int RB, int C, int kThreads>
struct LoadRows {
  static constexpr int kEach = (2 * C * RB + kThreads - 1) / kThreads;
  Sixteen<T> x[kEach];
  __device__ void load(const Inputs& in, const Sequence& s, int head, int first, int thread) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread + i * kThreads, row = at % RB * 16, step = at / RB % C;
      const bool is_key = at >= C * RB;
      const Rows& rows = is_key ? in.k : in.q;
      const int shared_head = is_key ? head / in.heads_a_key : head / in.heads_a_query;
      const int count = at < 2 * C * RB && first + step < s.length ? in.keys - row : 0;
      const T* from = static_cast<const T*>(rows.data) + s.batch * rows.batch + shared_head * rows.head;
      x[i].load(from + (s.begin + first + step) * rows.row + row, count, rows.vector);
    }
  }
  __device__ void store(Vectors<T, RB * 16, C>& q, Vectors<T, RB * 16, C>& k, int thread) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread + i * kThreads;
      if (at < 2 * C * RB) x[i].store(&(at < C * RB ? q : k).x[at / RB % C][at % RB * 16]);
    }
  }
};

// v, and dy where kTensors is 2.
template <typename T, int V, int C, int kThreads, int kTensors>
struct LoadColumns {
  static constexpr int kTasks = C * V / 16, kEach = (kTensors * kTasks + kThreads - 1) / kThreads;
  Sixteen<T> x[kEach];
  __device__ void load(const Rows& v, const Rows& dy, const Sequence& s, int head, int first, int thread) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread + i * kThreads, step = at / (V / 16) % C;
      const Rows& rows = kTensors == 2 && at >= kTasks ? dy : v;
      const int count = at < kTensors * kTasks && rows.data && first + step < s.length ? 16 : 0;
      const T* from = static_cast<const T*>(rows.data) + s.batch * rows.batch + head * rows.head;
      x[i].load(from + (s.begin + first + step) * rows.row + at % (V / 16) * 16, count, rows.vector);
    }
  }
  __device__ void store(Vectors<T, V, C>& v, Vectors<T, V, C>& dy, int thread) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread + i * kThreads;
      if (at < kTensors * kTasks)
        x[i].store(&(kTensors == 2 && at >= kTasks ? dy : v).x[at / (V / 16) % C][at % (V / 16) * 16]);
    }
  }
};

template <int C>
struct LoadForgets {
  float x;
  __device__ void load(const Rows& rows, const Sequence& s, int head, int first, int thread) {
    const float* from = static_cast<const float*>(rows.data) + s.batch * rows.batch + head * rows.head;
    x = thread < C && first + thread < s.length ? from[(s.begin + first + thread) * rows.row] : 1.f;
  }
  __device__ void store(Forgets<C>& to, int thread) const {
    if (thread < C) to.x[thread] = x;
  }
};

// All of a chunk's inputs on their way; dy only where kTensors is 2.
template <typename T, int V, int RB, int C, int kThreads, int kTensors>
struct Ahead {
  LoadRows<T, RB, C, kThreads> rows;
  LoadColumns<T, V, C, kThreads, kTensors> columns;
  LoadForgets<C> f;
  __device__ void load(const Inputs& in, const Rows& dy_rows, const Sequence& s, int head, int first, int thread) {
    rows.load(in, s, head, first, thread);
    columns.load(in.v, dy_rows, s, head, first, thread);
    f.load(in.forget, s, head, first, thread);
  }
  __device__ void store(
      Vectors<T, RB * 16, C>& q, Vectors<T, RB * 16, C>& k, Vectors<T, V, C>& v, Vectors<T, V, C>& dy, Forgets<C>& to,
      int thread) const {
    rows.store(q, k, thread);
    columns.store(v, dy, thread);
    f.store(to, thread);
  }
};

}  // namespace nam56r::m2rnn
