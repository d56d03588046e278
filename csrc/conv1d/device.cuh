// Device code that the forward and the backward of the causal convolution share.
//
// A thread owns V neighbouring channels and walks a run of rows (time steps) with the last W-1 inputs in registers.
// Offsets are 64-bit; row numbers are int, so that one batch row holds fewer than 2^31 steps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace nam56r::conv1d {

constexpr int kThreads = 128;

// Element [b, s, c] is data[b * batch + s * row + c].
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, row;
};

template <typename T>
struct Inputs {
  Rows<T> x;               // [B, S, C]
  const void* weight;      // [C, W], T or fp32
  const void* bias;        // [C], T or fp32; may be null
  bool weight_fp32, bias_fp32;
  const T* initial_state;  // [n, W-1, C]; may be null
  const int* cu_seqlens;   // [n + 1]; null: n = B sequences of S rows
  int batches, length, channels, sequences;  // B, S, C, n
  int run, runs;           // rows of a run; runs of a batch row
};

// Two 16-bit elements in a 32-bit word; the first in the low half.
__device__ inline float2 unpack(unsigned word, __half) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(pair));
  return __half22float2(pair);
}
__device__ inline float2 unpack(unsigned word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline __half2 pack(float low, float high, __half) { return __floats2half2_rn(low, high); }
__device__ inline __nv_bfloat162 pack(float low, float high, __nv_bfloat16) { return __floats2bfloat162_rn(low, high); }

template <int kBytes> struct AccessOf;
template <> struct AccessOf<2> { using type = unsigned short; };
template <> struct AccessOf<4> { using type = unsigned; };
template <> struct AccessOf<8> { using type = uint2; };
template <> struct AccessOf<16> { using type = uint4; };

// V elements that are read or written in one access, kept as words: split into 16-bit elements they take twice the
// registers.
template <typename T, int V>
struct Vec {
  using Access = typename AccessOf<sizeof(T) * V>::type;
  unsigned words[(sizeof(T) * V + 3) / 4];

  __device__ static Vec load(const T* from) {
    const Access access = __ldg(reinterpret_cast<const Access*>(from));
    Vec vec{};
    memcpy(vec.words, &access, sizeof(access));
    return vec;
  }

  __device__ void store(T* to) const {
    Access access;
    memcpy(&access, words, sizeof(access));
    *reinterpret_cast<Access*>(to) = access;
  }

  __device__ static Vec of(const float (&values)[V]) {
    Vec vec;
    if constexpr (sizeof(T) == 4) {
      memcpy(vec.words, values, sizeof(values));
    } else {
#pragma unroll
      for (int v = 0; v < V; v += 2) {
        const auto pair = pack(values[v], v + 1 < V ? values[v + 1] : 0.f, T{});
        memcpy(&vec.words[v / 2], &pair, sizeof(pair));
      }
    }
    return vec;
  }

  __device__ void floats(float* to) const {
    if constexpr (sizeof(T) == 4) {
      memcpy(to, words, sizeof(words));
    } else {
#pragma unroll
      for (int v = 0; v < V; v += 2) {
        const float2 pair = unpack(words[v / 2], T{});
        to[v] = pair.x;
        if (v + 1 < V) to[v + 1] = pair.y;
      }
    }
  }
};

template <int V, int N, typename T>
__device__ void load_floats(float (&to)[N], const T* from) {
  constexpr int kStep = V * sizeof(T) <= 16 ? V : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += kStep) Vec<T, kStep>::load(from + i).floats(to + i);
}

// The taps and the bias of V channels, in fp32.
template <typename T, int W, int V>
struct Parameters {
  float weight[W][V], bias[V];

  __device__ Parameters(const Inputs<T>& in, int channel) {
    float taps[V * W];
    const int64_t first = int64_t(channel) * W;
    if (in.weight_fp32) load_floats<V>(taps, static_cast<const float*>(in.weight) + first);
    else load_floats<V>(taps, static_cast<const T*>(in.weight) + first);
#pragma unroll
    for (int i = 0; i < V * W; ++i) weight[i % W][i / W] = taps[i];

    if (!in.bias) for (float& b : bias) b = 0;
    else if (in.bias_fp32) load_floats<V>(bias, static_cast<const float*>(in.bias) + channel);
    else load_floats<V>(bias, static_cast<const T*>(in.bias) + channel);
  }
};

struct Sequence {
  int index, begin, end;  // rows [begin, end)
};

// Bad cu_seqlens give wrong numbers, but no access outside of the tensors: every bound is clamped.
template <bool kPacked, typename T>
__device__ Sequence sequence_number(const Inputs<T>& in, int index) {
  if (!kPacked) return {index, 0, in.length};
  const int begin = min(max(in.cu_seqlens[index], 0), in.length);
  return {index, begin, min(max(in.cu_seqlens[index + 1], begin), in.length)};
}

// The sequence that a row of a batch row lies in. Empty sequences have no row and are passed over.
template <bool kPacked, typename T>
__device__ Sequence sequence_at(const Inputs<T>& in, int batch, int row) {
  if (!kPacked) return sequence_number<false>(in, batch);
  int low = 0, high = in.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (in.cu_seqlens[middle] <= row) low = middle;
    else high = middle - 1;
  }
  Sequence sequence = sequence_number<true>(in, low);
  sequence.begin = min(sequence.begin, row);
  return sequence;
}

// window[k] = input at row - (W-1) + k: from the initial state where that lies before the sequence, or zero.
// x points at the batch row's channel.
template <typename T, int W, int V>
__device__ void load_window(
    float (&window)[W - 1][V], const Inputs<T>& in, const T* x, const Sequence& sequence, int row, int channel) {
  const int64_t after_state = (int64_t(sequence.index) + 1) * (W - 1);
  const T* state = in.initial_state ? in.initial_state + after_state * in.channels + channel : nullptr;
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    const int from = row - (W - 1) + k, ago = sequence.begin - from;
    Vec<T, V> vec{};
    if (ago <= 0) vec = Vec<T, V>::load(x + from * in.x.row);
    else if (state) vec = Vec<T, V>::load(state - int64_t(ago) * in.channels);
    vec.floats(window[k]);
  }
}

// The next rows, of which `rows` exist; zero for the others.
template <typename T, int V, int kGroup>
__device__ void load_group(Vec<T, V> (&group)[kGroup], const T* x, int64_t stride, int rows) {
#pragma unroll
  for (int g = 0; g < kGroup; ++g) group[g] = g < rows ? Vec<T, V>::load(x + g * stride) : Vec<T, V>{};
}

// bias + sum over the taps, for the row whose input is `input`.
template <typename T, int W, int V>
__device__ float convolve(
    const Parameters<T, W, V>& p, const float (&window)[W - 1][V], const float (&input)[V], int v) {
  float sum = p.bias[v];
#pragma unroll
  for (int k = 0; k < W - 1; ++k) sum = fmaf(p.weight[k][v], window[k][v], sum);
  return fmaf(p.weight[W - 1][v], input[v], sum);
}

template <int N, int V>
__device__ void push(float (&window)[N][V], const float (&newest)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int k = 0; k + 1 < N; ++k) window[k][v] = window[k + 1][v];
    window[N - 1][v] = newest[v];
  }
}

// fp32 results get the accurate exp and division. For 16-bit ones approximations of 2^-22 are far below the last bit.
template <typename T>
__device__ float sigmoid(float a) {
  if constexpr (sizeof(T) == 4) return 1.f / (1.f + expf(-a));
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}

}  // namespace nam56r::conv1d
