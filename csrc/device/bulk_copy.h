// Bulk copies of a plain run of bytes, and the groups in which a thread waits for its bulk stores
// (sm_90).
//
// One thread starts a copy. Loads report their bytes to an mbarrier that expects them. Stores are
// collected in groups of the thread that started them. Sizes and all addresses are multiples of 16.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk".
#pragma once

#include "device/cache_policy.h"
#include "device/language.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"

namespace dgemma::device {

DGEMMA_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                             CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy.bits)
      : "memory");
}

// Copies to the same place in the shared memory of another block of the cluster, whose barrier (at
// the same place there) counts the bytes.
DGEMMA_DEVICE void bulk_copy_to_block(void* shared, const void* source, uint32_t bytes,
                                      Mbarrier* barrier, uint32_t block_rank) {
  asm volatile(
      "{ .reg .b32 place, counter;"
      " mapa.shared::cluster.u32 place, %0, %4; mapa.shared::cluster.u32 counter, %3, %4;"
      " cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
      " [place], [%1], %2, [counter]; }" ::"r"(shared_address(shared)),
      "r"(shared_address(source)), "r"(bytes), "r"(shared_address(barrier)), "r"(block_rank)
      : "memory");
}

// The bytes must have been made visible by fence_proxy_async, and may be overwritten after
// bulk_wait_read.
DGEMMA_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Closes the thread's group of the bulk stores (tma_store too) since the last commit.
DGEMMA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the sources of all but the newest `kPending` groups have been read.
template <int kPending>
DGEMMA_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all but the newest `kPending` groups are done: written, and seen by this thread.
template <int kPending>
DGEMMA_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

DGEMMA_DEVICE void bulk_prefetch_to_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

}  // namespace dgemma::device
