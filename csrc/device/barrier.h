// Barriers among some of a block's threads. A block has sixteen; number 0 is __syncthreads().
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier". `threads`
// counts the threads that arrive, those that wait included; whole warps take part, so it is a
// multiple of 32. Memory is ordered among them.
#pragma once

#include "device/language.h"

namespace dgemma::device {

// Arrives and waits for the others.
DGEMMA_DEVICE void named_barrier_sync(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Arrives and goes on.
DGEMMA_DEVICE void named_barrier_arrive(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace dgemma::device
