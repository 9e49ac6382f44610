// Warps. See csrc/device/warp.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

inline uint32_t lane_index() { return threadIdx.x % 32; }
// Collectives, as on the device.
inline uint32_t warp_index(SIM_SOURCE) {
  return __shfl_sync(kAllLanes, threadIdx.x / 32, 0, 32, source);
}
inline uint32_t warpgroup_index(SIM_SOURCE) {
  return __shfl_sync(kAllLanes, threadIdx.x / 128, 0, 32, source);
}

inline bool elect_one(SIM_SOURCE) {
  sim::warp_together("elect_one", source);
  return sim::elected_lane() == lane_index();
}

// Registers are counted: see collective.cpp.
template <int kRegisters>
void decrease_registers(SIM_SOURCE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  sim::set_registers(kRegisters, false, source);
}
template <int kRegisters>
void increase_registers(SIM_SOURCE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  sim::set_registers(kRegisters, true, source);
}

}  // namespace dgemma::device
