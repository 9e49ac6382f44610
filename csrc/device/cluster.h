// Blocks of a cluster: their ranks, their common barrier, each other's shared memory (sm_90).
//
// PTX ISA, "Special Registers: %cluster_ctarank", "barrier.cluster", "mapa". A block may leave only
// when no other block will touch its shared memory any more: end with cluster_sync().
#pragma once

#include "device/language.h"

namespace dgemma::device {

// This block's number within the cluster.
DGEMMA_DEVICE uint32_t cluster_block_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

DGEMMA_DEVICE uint32_t cluster_blocks() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return blocks;
}

// Every thread of the cluster arrives, then waits; writes before the one are seen after the other.
DGEMMA_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
DGEMMA_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DGEMMA_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of another block of the cluster; an ordinary pointer.
template <typename T>
DGEMMA_DEVICE T* shared_of_block(T* pointer, uint32_t block_rank) {
  uint64_t remote;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(remote)
               : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(block_rank));
  return reinterpret_cast<T*>(remote);
}

}  // namespace dgemma::device
