// What: causal depthwise convolution of width W (2..4) over time, with bias and SiLU, and the state after it.
//   y[b, t, c] = act(bias[c] + sum_w weight[c, w] x[b, t - (W-1) + w, c])
//   Before a sequence lies its initial state; final_state[n, k, c] is the input W-1-k rows before the sequence's end.
// Shapes: x [B, S, C] with any batch and row stride (last stride 1); weight [C, W]; bias [C]; y [B, S, C];
//   initial_state and final_state [n, W-1, C]; cu_seqlens [n + 1] int32 (B = 1), or n = B.
// Tiling: a thread owns 16 bytes of channels (8 of bf16) and a run of 4, 16 or 64 rows; threads are numbered
//   channels first, so that a warp reads 512 neighbouring bytes of a row. n * C / 8 threads more write final_state.
//   Where C, a stride or a pointer isn't a multiple of 16 bytes, a thread owns one channel.
// Registers: W taps and W-1 inputs of each channel in fp32, four rows in use and four on
//   their way. Shared memory: none.
// Bound: memory, 2 S C elements. A run reads W-1 rows of its neighbour again, from L1 or L2. Instructions: 13 an
//   element with SiLU, half of the memory time in bf16.

#include "conv1d/launch.h"

namespace nam56r {
namespace conv1d {
namespace {

constexpr int kGroup = 4;  // rows loaded together, one group ahead of the arithmetic

template <typename T, int W, bool kSilu, bool kPacked, int V>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const Inputs<T> in, T* y, T* final_state) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned vectors = in.channels / V;
  const unsigned task = thread / vectors, tasks = unsigned(in.batches) * in.runs;
  const int channel = (thread % vectors) * V;
  float window[W - 1][V];

  if (task >= tasks) {
    if (task - tasks >= in.sequences) return;
    const Sequence sequence = sequence_number<kPacked>(in, task - tasks);
    const T* x = in.x.data + (kPacked ? 0 : sequence.index * in.x.batch) + channel;
    load_window<T, W, V>(window, in, x, sequence, sequence.end, channel);
    T* to = final_state + int64_t(sequence.index) * (W - 1) * in.channels + channel;
#pragma unroll
    for (int k = 0; k < W - 1; ++k) Vec<T, V>::of(window[k]).store(to + int64_t(k) * in.channels);
    return;
  }

  const int batch = task / in.runs, first = (task % in.runs) * in.run, last = min(first + in.run, in.length);
  const T* x = in.x.data + batch * in.x.batch + channel;
  const Parameters<T, W, V> parameters(in, channel);
  Sequence sequence = sequence_at<kPacked>(in, batch, first);
  load_window<T, W, V>(window, in, x, sequence, first, channel);

  const T* from = x + first * in.x.row;
  T* to = y + (int64_t(batch) * in.length + first) * in.channels + channel;
  Vec<T, V> ahead[kGroup];
  load_group(ahead, from, in.x.row, last - first);
  for (int row = first; row < last; row += kGroup) {
    Vec<T, V> group[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) group[g] = ahead[g];
    from += kGroup * in.x.row;
    load_group(ahead, from, in.x.row, last - row - kGroup);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (kPacked && row + g == sequence.end && row + g < last) {
        sequence = sequence_at<kPacked>(in, batch, row + g);
        load_window<T, W, V>(window, in, x, sequence, row + g, channel);
      }
      float input[V], out[V];
      group[g].floats(input);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        out[v] = convolve(parameters, window, input, v);
        if (kSilu) out[v] *= sigmoid<T>(out[v]);
      }
      push(window, input);
      if (row + g < last) Vec<T, V>::of(out).store(to);
      to += in.channels;
    }
  }
}

}  // namespace
}  // namespace conv1d

std::tuple<Tensor, Tensor> causal_conv1d_forward(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, bool silu) {
  using namespace conv1d;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments a(x, weight, bias, initial_state, cu_seqlens);
  Tensor y = torch::stable::new_empty(a.x, {a.batches, a.length, a.channels});
  Tensor final_state = torch::stable::new_empty(a.x, {a.sequences, a.width - 1, a.channels});

  dispatch(a.x.scalar_type(), a.width, silu, a.cu_seqlens.has_value(), [&](auto t, auto w, auto s, auto p) {
    using T = decltype(t);
    const auto launch = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int64_t vectors = a.channels / V;
      const auto in = a.inputs<T>(a.run_length(vectors, {64, 16, 4}));
      const int64_t threads = (a.batches * in.runs + a.sequences) * vectors;
      if (threads == 0) return;
      STD_TORCH_CHECK(threads <= UINT32_MAX - kThreads, "causal_conv1d: x takes ", threads, " threads: too many");
      forward_kernel<T, decltype(w)::value, decltype(s)::value, decltype(p)::value, V>
          <<<unsigned((threads + kThreads - 1) / kThreads), kThreads, 0, stream_of(a.x)>>>(
              in, static_cast<T*>(y.mutable_data_ptr()), static_cast<T*>(final_state.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    constexpr int kBytes = 16;
    if (a.vectorized(kBytes)) launch(std::integral_constant<int, kBytes / int(sizeof(T))>{});
    else launch(std::integral_constant<int, 1>{});
  });
  return {y, final_state};
}

}  // namespace nam56r
