// Global memory. See csrc/device/memory.h.
#pragma once

#include "device/language.h"
#include "flags.h"

namespace dgemma::device {

inline uint4 load_once(const void* global, SIM_SOURCE) {
  sim::check_aligned(global, 16, "load_once", source);
  return *static_cast<const uint4*>(global);
}
inline void store_once(void* global, uint4 v, SIM_SOURCE) {
  sim::check_aligned(global, 16, "store_once", source);
  *static_cast<uint4*>(global) = v;
}

inline uint32_t load_acquire(const uint32_t* flag, SIM_SOURCE) {
  return sim::load_flag(flag, source);
}
inline void store_release(uint32_t* flag, uint32_t value, SIM_SOURCE) {
  sim::store_flag(flag, value, source);
}
inline uint32_t add_acquire_release(uint32_t* counter, uint32_t value, SIM_SOURCE) {
  return sim::add_to_counter(counter, value, source);
}
inline void prefetch_to_l2(const void*) {}

}  // namespace dgemma::device
