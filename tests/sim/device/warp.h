// Warps. See csrc/device/warp.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

inline uint32_t lane_index() { return threadIdx.x % 32; }
inline uint32_t warp_index() { return threadIdx.x / 32; }
inline uint32_t warpgroup_index() { return threadIdx.x / 128; }

inline bool elect_one(SIM_SOURCE) {
  return static_cast<uint32_t>(__shfl_sync(kAllLanes, static_cast<int>(sim::elected_lane()), 0, 32,
                                           source)) == lane_index();
}

// Registers are not counted here; only the rules of the numbers hold.
template <int kRegisters>
void decrease_registers(SIM_SOURCE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  __syncwarp(kAllLanes, source);
}
template <int kRegisters>
void increase_registers(SIM_SOURCE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  __syncwarp(kAllLanes, source);
}

}  // namespace dgemma::device
