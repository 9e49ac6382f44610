// What a multiprocessor holds at once, for launch plans (CUDA C++ Programming Guide, "Compute
// Capabilities").
#pragma once

#include <cstdint>

namespace dgemma {

// Shared memory of a multiprocessor, of which each block loses kSharedReserved to the system. A GPU
// that is not named here is planned as those with the least.
constexpr int32_t shared_bytes_of_multiprocessor(int32_t compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return 164 * 1024;
    case 90:
    case 100:
    case 103:
      return 228 * 1024;
    default:
      return 100 * 1024;
  }
}
constexpr int32_t kSharedReserved = 1024;

// Whether blocks of so many threads make a multiprocessor full, where registers admit it: it holds
// 1,536 threads in 16 blocks on 8.6 (in 24 on 8.9 and 12.0), 2,048 in 32 on others. What kernels
// ask whose threads share nothing.
constexpr bool fills_multiprocessor(int32_t threads) {
  return 1536 % threads == 0 && 2048 % threads == 0 && 1536 / threads <= 16;
}

}  // namespace dgemma
