// Bulk copies, which land late. See csrc/device/bulk_copy.h.
#pragma once

#include "device/cache_policy.h"
#include "device/language.h"
#include "device/mbarrier.h"

namespace dgemma::device {

inline void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                      CachePolicy, SIM_SOURCE) {
  sim::bulk_load(shared, global, bytes, &barrier->state, source);
}
inline void bulk_copy_to_block(void* shared, const void* from, uint32_t bytes, Mbarrier* barrier,
                               uint32_t block_rank, SIM_SOURCE) {
  sim::bulk_copy_to_block(shared, from, bytes, &barrier->state, block_rank, source);
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes, SIM_SOURCE) {
  sim::bulk_store(global, shared, bytes, source);
}
inline void bulk_commit() { sim::bulk_commit(); }
template <int kPending>
void bulk_wait_read(SIM_SOURCE) {
  sim::bulk_wait(kPending, true, source);
}
template <int kPending>
void bulk_wait(SIM_SOURCE) {
  sim::bulk_wait(kPending, false, source);
}
inline void bulk_prefetch_to_l2(const void*, uint32_t) {}

}  // namespace dgemma::device
