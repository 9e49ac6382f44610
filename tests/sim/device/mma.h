// mma.sync. See csrc/device/mma.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         SIM_SOURCE) {
  sim::mma_m16n8k16(d, a, b, source);
}

inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              SIM_SOURCE) {
  sim::mma_m16n8k32_e4m3(d, a, b, source);
}

inline void mma_m16n8k32_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              SIM_SOURCE) {
  sim::mma_m16n8k32_int8(d, a, b, source);
}

}  // namespace dgemma::device
