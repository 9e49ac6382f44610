// cp.async, which lands late. See csrc/device/cp_async.h.
#pragma once

#include "device/language.h"
#include "device/mbarrier.h"

namespace dgemma::device {

inline void cp_async_16(void* shared, const void* global, uint32_t bytes_read = 16, SIM_SOURCE) {
  sim::small_copy(shared, global, 16, bytes_read, source);
}
inline void cp_async_8(void* shared, const void* global, uint32_t bytes_read = 8, SIM_SOURCE) {
  sim::small_copy(shared, global, 8, bytes_read, source);
}
inline void cp_async_4(void* shared, const void* global, uint32_t bytes_read = 4, SIM_SOURCE) {
  sim::small_copy(shared, global, 4, bytes_read, source);
}
inline void cp_async_commit() { sim::small_copy_commit(); }
template <int kPending>
void cp_async_wait(SIM_SOURCE) {
  sim::small_copy_wait(kPending, source);
}
inline void cp_async_mbarrier_arrive(Mbarrier* barrier, SIM_SOURCE) {
  sim::small_copy_mbarrier_arrive(&barrier->state, source);
}

}  // namespace dgemma::device
