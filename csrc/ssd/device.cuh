// What the kernels of the scan share beside csrc/hopper: the barriers' numbers, gates.
//
// These headers include nothing but each other and csrc/hopper: NVRTC compiles them at run time for what isn't built ahead.
#pragma once

#include "hopper/device.cuh"

namespace nam56r::ssd {

// Barriers by number, of `threads` that wait or have only arrived: a stage's tiles are there, a stage is free (four of
// each), the threads that multiply are at one point (two warpgroups of them in `gradient`), those that turn are.
constexpr int kFull = 1, kEmpty = 5, kProducts = 9, kTurning = 11;
// In `gradient`: what is turned back can be read, has been read; the same of the scores. It has two stages, so that a number
// of theirs is left: the threads of make_angles are at one point.
constexpr int kTurned = 12, kRead = 13, kScores = 14, kScoresRead = 15, kAngles = 7;

__device__ inline float sigmoid(float x) { return reciprocal(1.f + exp_(-x)); }
__device__ inline float silu(float x, float plain) { return x * sigmoid(x) + plain; }  // plain: 1 without gates, where x is 0

}  // namespace nam56r::ssd
