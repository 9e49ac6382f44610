// A thread's place within its warp and warpgroup, and how a warp picks one lane.
#pragma once

#include "device/language.h"

namespace dgemma::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Blocks are one-dimensional: threadIdx.x numbers the threads.
DGEMMA_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }

// Broadcast from lane 0, so that the compiler knows it to be the same in all lanes: a branch on it
// does not diverge.
DGEMMA_DEVICE uint32_t warp_index() { return __shfl_sync(kAllLanes, threadIdx.x / 32, 0); }

// Four warps, the unit that issues wgmma.
DGEMMA_DEVICE uint32_t warpgroup_index() { return __shfl_sync(kAllLanes, threadIdx.x / 128, 0); }

// elect.sync: true in one lane of the warp, always the same one; which one is not said. All 32
// lanes must call this. PTX ISA, "Parallel Synchronization and Communication Instructions:
// elect.sync" (sm_90).
DGEMMA_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected)
               :
               : "memory");
  return elected != 0;
}

// setmaxnreg: gives registers back to the block's pool, or waits until as many can be taken from
// it. Every warp of the warpgroup calls it once, with the same multiple of 8 between 24 and 256. It
// works only in a kernel with a register limit at entry (__launch_bounds__ with both numbers). PTX
// ISA, "Miscellaneous Instructions: setmaxnreg" (sm_90a).
template <int kRegisters>
DGEMMA_DEVICE void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DGEMMA_DEVICE void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dgemma::device
