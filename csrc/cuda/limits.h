// Limits of the GPUs that launch plans and kernels both rest on (CUDA C++ Programming Guide,
// "Compute Capabilities").
#pragma once

#include <cstdint>

namespace dgemma {

// Shared memory that a block may have on sm_90: 227 KB.
constexpr int32_t kSharedLimit90 = 227 * 1024;
// Shared memory that a block may have on 8.6, 8.9 and 12.0, which have the least: 99 KB.
constexpr int32_t kSharedLimit80 = 99 * 1024;

}  // namespace dgemma
