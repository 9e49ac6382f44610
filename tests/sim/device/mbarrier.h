// mbarriers. See csrc/device/mbarrier.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct alignas(8) Mbarrier {
  uint64_t state;
};

inline void mbarrier_init(Mbarrier* barrier, uint32_t arrivals, SIM_SOURCE) {
  sim::mbarrier_init(&barrier->state, arrivals, source);
}
inline void mbarrier_invalidate(Mbarrier* barrier, SIM_SOURCE) {
  sim::mbarrier_invalidate(&barrier->state, source);
}
inline void mbarrier_arrive(Mbarrier* barrier, SIM_SOURCE) {
  sim::mbarrier_arrive(&barrier->state, source);
}
inline void mbarrier_arrive_times(Mbarrier* barrier, uint32_t arrivals, SIM_SOURCE) {
  for (uint32_t i = 0; i < arrivals; ++i) sim::mbarrier_arrive(&barrier->state, source);
}
inline void mbarrier_arrive_at_block(Mbarrier* barrier, uint32_t block_rank, SIM_SOURCE) {
  sim::mbarrier_arrive_at_block(&barrier->state, block_rank, source);
}
inline void mbarrier_expect_bytes(Mbarrier* barrier, uint32_t bytes, SIM_SOURCE) {
  sim::mbarrier_expect_bytes(&barrier->state, bytes, source);
}
inline void mbarrier_arrive_expect_bytes(Mbarrier* barrier, uint32_t bytes, SIM_SOURCE) {
  sim::mbarrier_expect_bytes(&barrier->state, bytes, source);
  sim::mbarrier_arrive(&barrier->state, source);
}
inline bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity, SIM_SOURCE) {
  return sim::mbarrier_try_wait(&barrier->state, parity, source);
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity, SIM_SOURCE) {
  sim::mbarrier_wait(&barrier->state, parity, source);
}

}  // namespace dgemma::device
