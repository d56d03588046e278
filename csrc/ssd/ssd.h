// The scan's functions, as bindings.cpp registers them. A kernel is launched by a handle, with Arguments as a list:
// kernels/ssd/cuda.py decides shapes, grids and buffers.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace nam56r {

using torch::stable::Tensor;

// The kernels that this extension holds code for, such as "forward<bf16,2,4,128>": element type, model, rank, N.
std::vector<std::string> ssd_built();

// A built kernel's handle.
int64_t ssd_kernel(std::string name);

// Handles of the kernels of these names in a cubin (its bytes, [n] uint8 on the CPU), for devices of its architecture.
std::vector<int64_t> ssd_load(Tensor cubin, std::vector<std::string> names);

// Bytes of shared memory that a kernel ("forward", ...) of this shape takes, or a chunk's turns ("Turns").
int64_t ssd_shared(std::string kernel, int64_t model, int64_t rank, int64_t d_state);

// Launches on the current stream of on's device, early (see device.cuh) or not, with Maps or without. arguments are the fields of
// struct Arguments, in order.
void ssd_launch(
    Tensor on, int64_t kernel, bool early, bool mapped, int64_t rank, int64_t d_state, int64_t grid_x, int64_t grid_y, int64_t grid_z, int64_t threads,
    int64_t shared, std::vector<int64_t> arguments);

}  // namespace nam56r
