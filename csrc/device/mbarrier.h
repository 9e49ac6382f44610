// mbarrier: a barrier in shared memory that counts arrivals of threads and bytes of asynchronous
// copies.
//
// A phase ends when as many arrivals have come as it was initialised for, and as many bytes as were
// expected; then the next begins with the same count. Phases are numbered from 0, and one waits for
// a phase by its parity: waiting for parity p returns once the phase now running has the other
// parity. So on a fresh barrier parity 1 returns at once. A thread may not fall two phases behind.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". Byte counts need
// sm_90; arrivals and waiting work from sm_80.
#pragma once

#include "device/language.h"
#include "device/shared_memory.h"

namespace dgemma::device {

struct alignas(8) Mbarrier {
  uint64_t state;
};

// One thread calls this, once; before others use the barrier come fence_mbarrier_init() (sm_90) and
// a block barrier.
DGEMMA_DEVICE void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Ends its life, so that its eight bytes may be used for something else.
DGEMMA_DEVICE void mbarrier_invalidate(Mbarrier* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DGEMMA_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                   shared_address(barrier))
               : "memory");
}

// Arrives so many times at once (sm_90).
DGEMMA_DEVICE void mbarrier_arrive_times(Mbarrier* barrier, uint32_t arrivals) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0], %1; }" ::"r"(
                   shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Arrives at the barrier that lies at the same place in the shared memory of a block of the
// cluster. Says that reads are done; writes are ordered within this block alone: in
// .release.cluster nvcc puts a fence of the whole GPU's memory, for which every warp would wait at
// every stage.
DGEMMA_DEVICE void mbarrier_arrive_at_block(Mbarrier* barrier, uint32_t block_rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(block_rank)
      : "memory");
}

// Makes the running phase wait for so many bytes more; not an arrival.
DGEMMA_DEVICE void mbarrier_expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Does both at once, as a producer does before it starts the copies.
DGEMMA_DEVICE void mbarrier_arrive_expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// True when the phase of this parity is over. On sm_90 it may sleep for a while before it says no.
DGEMMA_DEVICE bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity) {
  uint32_t over;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return over != 0;
}

DGEMMA_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace dgemma::device
