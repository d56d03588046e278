// All kernels of the scan, for a run-time compiler.
#pragma once

#include "ssd/forward.cuh"
#include "ssd/gradient.cuh"
#include "ssd/turns.cuh"
#include "ssd/walk.cuh"
