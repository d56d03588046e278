// All kernels of M²RNN, for a run-time compiler.
#pragma once

#include "m2rnn/forward.cuh"
#include "m2rnn/gradient.cuh"
#include "m2rnn/products.cuh"
#include "m2rnn/reduce.cuh"
