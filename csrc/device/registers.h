// How the threads of a block share its registers once their roles part (setmaxnreg, sm_90a).
//
// A kernel with launch bounds of one block per multiprocessor and with setmaxnreg begins with as
// many registers a thread as the bounds allow, in eights. Those are the block's. What the division
// leaves over of the 65,536 never is: an increase that counts on it waits forever. PTX ISA,
// "Miscellaneous Instructions: setmaxnreg".
#pragma once

#include "device/warp.h"

namespace dgemma::device {

constexpr int registers_at_entry(int threads) {
  return (threads > 256 ? 65536 / threads : 256) / 8 * 8;
}

// Some warpgroups take registers that the others give back. All threads of the block call one of
// the two, once. PTX ISA: multiples of 8, and whole warpgroups.
template <int kTakers, int kMore, int kGivers, int kLess>
struct RegisterPlan {
  static constexpr int kThreads = kTakers + kGivers, kAtEntry = registers_at_entry(kThreads);
  static_assert(kTakers % 128 == 0 && kGivers % 128 == 0);
  static_assert(kMore >= kAtEntry && kLess <= kAtEntry);
  static_assert(kTakers * kMore + kGivers * kLess <= kThreads * kAtEntry,
                "the block does not own so many registers: setmaxnreg.inc would wait forever");

  static DGEMMA_DEVICE void take() { increase_registers<kMore>(); }
  static DGEMMA_DEVICE void give_back() { decrease_registers<kLess>(); }
};

}  // namespace dgemma::device
