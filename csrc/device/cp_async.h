// cp.async: a thread starts a copy of 4, 8 or 16 bytes from global to shared memory and goes on
// (sm_80).
//
// The bytes may be used by the thread after cp_async_wait, by others after a barrier that follows,
// and by wgmma or a bulk copy after fence_proxy_async too. PTX ISA, "Data Movement and Conversion
// Instructions: cp.async".
#pragma once

#include "device/language.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"

namespace dgemma::device {

// 16 bytes, past L1. The first `bytes_read` of them are read, the rest become zero: 0 reads
// nothing, so a row outside the tensor needs no branch. Both addresses are multiples of 16.
DGEMMA_DEVICE void cp_async_16(void* shared, const void* global, uint32_t bytes_read = 16) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes_read)
      : "memory");
}

// 8 or 4 bytes, through L1; aligned to their size.
DGEMMA_DEVICE void cp_async_8(void* shared, const void* global, uint32_t bytes_read = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes_read)
               : "memory");
}
DGEMMA_DEVICE void cp_async_4(void* shared, const void* global, uint32_t bytes_read = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes_read)
               : "memory");
}

// Closes the thread's group of the copies since the last commit; an empty group counts too.
DGEMMA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest `kPending` groups of this thread are still under way.
template <int kPending>
DGEMMA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at the barrier, as one of the arrivals it was initialised for, once all copies that this
// thread has started so far are done. The thread itself does not wait.
DGEMMA_DEVICE void cp_async_mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

}  // namespace dgemma::device
