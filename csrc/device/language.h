// The parts of CUDA C++ that a kernel file uses: function qualifiers, threadIdx and its kin, vector
// types, warp votes and shuffles, atomics. Under nvcc all of it is there already;
// tests/sim/device/language.h gives it on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DGEMMA_DEVICE __device__ __forceinline__
