// What: the gradients of the causal depthwise convolution. With a = bias + sum_w weight[w] x[t - (W-1) + w] and
//   g = dy act'(a), a recomputed from x:
//   dx[s] = sum_w weight[w] g[s + (W-1) - w] over the rows of s's own sequence; + dfinal_state for its last W-1 rows
//   dweight[w] = sum_t g[t] x[t - (W-1) + w]     dbias = sum_t g[t]
//   dinitial_state = dx of the W-1 rows before a sequence
// Shapes: as in forward.cu; dy [B, S, C] with any batch and row stride (last stride 1); partial [blocks, W+1, C] fp32.
// Tiling: a thread owns 8 bytes of channels (4 of bf16) and a run of 8, 32 or 64 rows, and reads W-1 rows more at
//   either end. A block is 4 runs of 32 such threads. It adds its runs' dweight and dbias in shared memory and writes
//   them to `partial`; a second kernel adds the blocks. Every order is fixed: the same bits each time, no atomics.
// Registers: taps, W-1 inputs, W-1 g's and W+1 sums of each channel in fp32 (16 bytes of channels would spill); three
//   rows of x and dy in use and three on their way. Shared memory: 4 runs x (W+1) sums x 32 threads, up to 10 KiB.
// Bound: memory, 3 S C elements (x, dy, dx), with the issue of instructions close behind: about 36 an element, nine
//   tenths of the memory time in bf16. `partial` adds 5 % of traffic to runs of 32, 3 % to runs of 64.

#include "conv1d/launch.h"

namespace nam56r {
namespace conv1d {
namespace {

constexpr int kGroup = 3;  // rows loaded together, one group ahead of the arithmetic; with 4, width 4 spills
constexpr int kLanes = 32;
constexpr int kRuns = kThreads / kLanes;

// The gradient before the activation.
template <typename T, bool kSilu>
__device__ float through_activation(float dy, float a) {
  if (!kSilu) return dy;
  const float s = sigmoid<T>(a);
  return dy * s * fmaf(a, 1.f - s, 1.f);
}

template <typename T, int W, bool kSilu, bool kPacked, int V>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const Inputs<T> in, const Rows<T> dy, const T* dfinal_state, T* dx, float* partial) {
  constexpr unsigned kBefore = (1u << (W - 1)) - 1;
  const int channel = (blockIdx.y * kLanes + threadIdx.x) * V;
  const unsigned task = blockIdx.x * kRuns + threadIdx.y;
  float dweight[W + 1][V] = {};  // the last is dbias

  if (channel < in.channels && task < unsigned(in.batches) * in.runs) {
    const int batch = task / in.runs, first = (task % in.runs) * in.run, last = min(first + in.run, in.length);
    const int limit = min(last + W - 1, in.length);
    const T* x = in.x.data + batch * in.x.batch + channel;
    const Parameters<T, W, V> parameters(in, channel);
    Sequence sequence = sequence_at<kPacked>(in, batch, first);
    float window[W - 1][V], grads[W - 1][V] = {};  // of rows row - (W-1) .. row - 1
    load_window<T, W, V>(window, in, x, sequence, first, channel);
    unsigned begins = 0;  // bit i: a sequence begins (or the batch row ends) at row - i

    const T* from = x + first * in.x.row;
    const T* dy_from = dy.data + batch * dy.batch + first * dy.row + channel;
    T* to = dx + (int64_t(batch) * in.length + first - (W - 1)) * in.channels + channel;
    Vec<T, V> ahead[kGroup], dy_ahead[kGroup];
    load_group(ahead, from, in.x.row, limit - first);
    load_group(dy_ahead, dy_from, dy.row, limit - first);
    for (int start = first; start < last + W - 1; start += kGroup) {
      Vec<T, V> group[kGroup], dy_group[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) group[g] = ahead[g], dy_group[g] = dy_ahead[g];
      from += kGroup * in.x.row;
      dy_from += kGroup * dy.row;
      load_group(ahead, from, in.x.row, limit - start - kGroup);
      load_group(dy_ahead, dy_from, dy.row, limit - start - kGroup);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int row = start + g, done = row - (W - 1);  // dx[done] is complete after this row
        begins = begins << 1 | (row == sequence.end);
        if (kPacked && row == sequence.end && row < limit) {
          sequence = sequence_at<kPacked>(in, batch, row);
          load_window<T, W, V>(window, in, x, sequence, row, channel);
        }
        float input[V], grad[V], out[V];
        group[g].floats(input);
        dy_group[g].floats(grad);
#pragma unroll
        for (int v = 0; v < V; ++v)
          grad[v] = through_activation<T, kSilu>(grad[v], convolve(parameters, window, input, v));
        if (row < last) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
#pragma unroll
            for (int k = 0; k < W - 1; ++k) dweight[k][v] = fmaf(grad[v], window[k][v], dweight[k][v]);
            dweight[W - 1][v] = fmaf(grad[v], input[v], dweight[W - 1][v]);
            dweight[W][v] += grad[v];
          }
        }
        // Rows done + j, while they are of the same sequence as `done`.
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = parameters.weight[W - 1][v] * grads[0][v];
#pragma unroll
        for (int j = 1; j < W; ++j) {
          if ((begins & kBefore) >> (W - 1 - j)) continue;
#pragma unroll
          for (int v = 0; v < V; ++v)
            out[v] = fmaf(parameters.weight[W - 1 - j][v], j < W - 1 ? grads[j][v] : grad[v], out[v]);
        }
        push(window, input);
        push(grads, grad);
        if (first <= done && done < last) {
          if (dfinal_state && (begins & kBefore)) {
            const int state_row = 31 - __clz(begins & kBefore);
            const int index = sequence_at<kPacked>(in, batch, done).index;
            const int64_t at = (int64_t(index) * (W - 1) + state_row) * in.channels + channel;
            float state[V];
            Vec<T, V>::load(dfinal_state + at).floats(state);
#pragma unroll
            for (int v = 0; v < V; ++v) out[v] += state[v];
          }
          Vec<T, V>::of(out).store(to);
        }
        to += in.channels;
      }
    }
  }

  __shared__ float sums[(W + 1) * V][kRuns][kLanes];
#pragma unroll
  for (int i = 0; i < (W + 1) * V; ++i) sums[i][threadIdx.y][threadIdx.x] = dweight[i / V][i % V];
  __syncthreads();
  const int block_channel = blockIdx.y * kLanes * V;
  for (int i = threadIdx.y * kLanes + threadIdx.x; i < (W + 1) * kLanes * V; i += kThreads) {
    const int tap = i / (kLanes * V), c = i % (kLanes * V);
    float sum = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) sum += sums[tap * V + c % V][run][c / V];
    if (block_channel + c < in.channels)
      partial[(int64_t(blockIdx.x) * (W + 1) + tap) * in.channels + block_channel + c] = sum;
  }
}

// dweight [C, W] and dbias [C] from partial [blocks, W+1, C]. A block adds 32 columns, 32 threads a column.
template <typename T, int W>
__global__ void __launch_bounds__(kLanes * kLanes)
    add_blocks(const float* partial, int blocks, const Inputs<T> in, void* dweight, void* dbias) {
  __shared__ float sums[kLanes][kLanes + 1];
  const int64_t columns = int64_t(in.channels) * (W + 1), block_column = int64_t(blockIdx.x) * kLanes;
  partial += block_column + threadIdx.x;
  float sum = 0;
  if (block_column + threadIdx.x < columns) {
#pragma unroll 8
    for (int block = threadIdx.y; block < blocks; block += kLanes) sum += partial[block * columns];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = sums[threadIdx.x][threadIdx.y];  // a warp holds a column
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);

  const int64_t column = block_column + threadIdx.y, channel = column % in.channels, tap = column / in.channels;
  const bool is_bias = tap == W;
  void* to = is_bias ? dbias : dweight;
  const int64_t at = is_bias ? channel : channel * W + tap;
  if (threadIdx.x != 0 || column >= columns || !to) return;
  if (is_bias ? in.bias_fp32 : in.weight_fp32) static_cast<float*>(to)[at] = sum;
  else Vec<T, 1>::of({sum}).store(static_cast<T*>(to) + at);
}

// dinitial_state [n, W-1, C]: a thread walks the first W-1 rows of one sequence again.
template <typename T, int W, bool kSilu, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    initial_state_kernel(const Inputs<T> in, const Rows<T> dy, const T* dfinal_state, T* dinitial_state) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned index = thread / in.channels;
  const int channel = thread % in.channels;
  if (index >= in.sequences) return;
  const Sequence sequence = sequence_number<kPacked>(in, index);
  const int64_t batch = kPacked ? 0 : index;
  const T* x = in.x.data + batch * in.x.batch + channel;
  const Parameters<T, W, 1> parameters(in, channel);
  float window[W - 1][1], gradient[W - 1] = {};
  load_window<T, W, 1>(window, in, x, sequence, sequence.begin, channel);
#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
    const int64_t row = sequence.begin + i;
    if (row >= sequence.end) break;
    float input[1], grad[1];
    Vec<T, 1>::load(x + row * in.x.row).floats(input);
    Vec<T, 1>::load(dy.data + batch * dy.batch + row * dy.row + channel).floats(grad);
    const float g = through_activation<T, kSilu>(grad[0], convolve(parameters, window, input, 0));
#pragma unroll
    for (int k = i; k < W - 1; ++k) gradient[k] = fmaf(parameters.weight[k - i][0], g, gradient[k]);
    push(window, input);
  }
  const int rows = sequence.end - sequence.begin;
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    const int64_t first = int64_t(index) * (W - 1);
    float state[1] = {};
    if (dfinal_state && k >= rows)
      Vec<T, 1>::load(dfinal_state + (first + k - rows) * in.channels + channel).floats(state);
    Vec<T, 1>::of({gradient[k] + state[0]}).store(dinitial_state + (first + k) * in.channels + channel);
  }
}

}  // namespace
}  // namespace conv1d

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    Tensor dy, std::optional<Tensor> dfinal_state, Tensor x, Tensor weight, std::optional<Tensor> bias,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, bool silu) {
  using namespace conv1d;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments a(x, weight, bias, initial_state, cu_seqlens);
  dy = dense_rows(dy);
  dfinal_state = dense(dfinal_state);
  const auto empty_like = [&](const std::optional<Tensor>& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(a.x, {0});
  };
  Tensor dx = torch::stable::new_empty(a.x, {a.batches, a.length, a.channels});
  Tensor dweight = empty_like(a.weight), dbias = empty_like(a.bias);
  Tensor dinitial_state = empty_like(a.initial_state);
  const cudaStream_t stream = stream_of(a.x);

  dispatch(a.x.scalar_type(), a.width, silu, a.cu_seqlens.has_value(), [&](auto t, auto w, auto s, auto p) {
    using T = decltype(t);
    constexpr int W = decltype(w)::value;
    constexpr bool kSilu = decltype(s)::value, kPacked = decltype(p)::value;
    const T* dfinal = pointer<T>(dfinal_state);
    const auto launch = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int64_t lane_blocks = (a.channels / V + kLanes - 1) / kLanes;
      const auto in = a.inputs<T>(a.run_length(lane_blocks * kLanes, {64, 32, 8}));
      const int64_t run_blocks = (a.batches * in.runs + kRuns - 1) / kRuns;
      STD_TORCH_CHECK(
          run_blocks < (int64_t(1) << 30) && lane_blocks < 65536, "causal_conv1d: x is too large: ", run_blocks, " x ",
          lane_blocks, " blocks");
      Tensor partial = torch::stable::new_empty(a.x, {run_blocks, W + 1, a.channels}, ScalarType::Float);
      auto* sums = static_cast<float*>(partial.mutable_data_ptr());
      if (run_blocks * lane_blocks > 0) {
        backward_kernel<T, W, kSilu, kPacked, V>
            <<<dim3(unsigned(run_blocks), unsigned(lane_blocks)), dim3(kLanes, kRuns), 0, stream>>>(
                in, rows<T>(dy), dfinal, static_cast<T*>(dx.mutable_data_ptr()), sums);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      const int64_t columns = a.channels * (W + 1);
      if (columns > 0) {
        add_blocks<T, W><<<unsigned((columns + kLanes - 1) / kLanes), dim3(kLanes, kLanes), 0, stream>>>(
            sums, int(run_blocks), in, dweight.mutable_data_ptr(), a.bias ? dbias.mutable_data_ptr() : nullptr);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    };
    constexpr int kBytes = 8;
    if (a.vectorized(kBytes, {dy, dfinal_state})) launch(std::integral_constant<int, kBytes / int(sizeof(T))>{});
    else launch(std::integral_constant<int, 1>{});

    const int64_t threads = a.initial_state ? a.sequences * a.channels : 0;
    if (threads == 0) return;
    STD_TORCH_CHECK(threads <= UINT32_MAX - kThreads, "causal_conv1d: n * C is ", threads, ": too many states");
    initial_state_kernel<T, W, kSilu, kPacked><<<unsigned((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        a.inputs<T>(1), rows<T>(dy), dfinal, static_cast<T*>(dinitial_state.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dx, dweight, dbias, dinitial_state};
}

}  // namespace nam56r
