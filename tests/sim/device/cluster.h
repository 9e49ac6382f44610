// Clusters. See csrc/device/cluster.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

inline uint32_t cluster_block_rank() { return sim::rank_in_cluster(); }
inline uint32_t cluster_blocks() { return sim::blocks_of_cluster(); }
inline void cluster_arrive(SIM_SOURCE) { sim::cluster_arrive(source); }
inline void cluster_wait(SIM_SOURCE) { sim::cluster_wait(source); }
inline void cluster_sync(SIM_SOURCE) {
  sim::cluster_arrive(source);
  sim::cluster_wait(source);
}
template <typename T>
T* shared_of_block(T* pointer, uint32_t block_rank, SIM_SOURCE) {
  return static_cast<T*>(
      sim::shared_of_block(const_cast<std::remove_const_t<T>*>(pointer), block_rank, source));
}

}  // namespace dgemma::device
