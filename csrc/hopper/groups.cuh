// Warpgroups that multiply: their barriers, their turns, and what a thread has of a product.
#pragma once

#include "hopper/device.cuh"

namespace nam56r {

// Barriers by number: a group's turn at the tensor cores; a group's threads are at one point.
constexpr int kTurn = 1, kGroup = 8;

// A group's products are asked for after those of the group before it: they run while the others work on the results of theirs.
template <int GROUPS>
struct Turns {
  int mine, next;

  __device__ explicit Turns(int group) : mine(kTurn + group), next(kTurn + (group + 1) % GROUPS) {
    if (group == GROUPS - 1) hand_over();
  }
  __device__ void take() const { wait_at(mine, 256); }
  __device__ void hand_over() const { arrive_at(next, 256); }
};

// Of a group's 64 rows, the first of the thread's warp's 16.
__device__ inline int warp_row() { return threadIdx.x % 128 / 32 * 16; }

// The same in every thread, and to the compiler a new value: or it makes all descriptors of a loop before it, and spills them.
__device__ inline int anew(int x) { return __shfl_sync(~0u, x, 0); }

}  // namespace nam56r
