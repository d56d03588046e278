// All kernels of the scan, for a run-time compiler.
#pragma once

#include "ssd/carry.cuh"
#include "ssd/forward.cuh"
#include "ssd/key.cuh"
#include "ssd/query.cuh"
