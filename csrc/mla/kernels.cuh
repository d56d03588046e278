// All kernels of attention.
#pragma once

#include "mla/forward.cuh"
#include "mla/keys.cuh"
#include "mla/queries.cuh"
#include "mla/rows.cuh"
#include "mla/sums.cuh"
