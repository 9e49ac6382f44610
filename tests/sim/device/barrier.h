// Named barriers. See csrc/device/barrier.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

inline void named_barrier_sync(uint32_t barrier, uint32_t threads, SIM_SOURCE) {
  sim::barrier_sync(barrier, threads, source);
}
inline void named_barrier_arrive(uint32_t barrier, uint32_t threads, SIM_SOURCE) {
  sim::barrier_arrive(barrier, threads, source);
}

}  // namespace dgemma::device
