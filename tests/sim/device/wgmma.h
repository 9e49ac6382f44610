// wgmma, which lands late. See csrc/device/wgmma.h.
#pragma once

#include "device/language.h"
#include "device/matrix_descriptor.h"

namespace dgemma::device {

// Accumulators need no holding here: they are NaN while the unit has them. At most two, and not as
// a pack, because the calling line comes last.
inline void wgmma_fence(SIM_SOURCE) { sim::wgmma_fence(source); }
template <typename First>
void wgmma_fence(First&, SIM_SOURCE) {
  sim::wgmma_fence(source);
}
template <typename First, typename Second>
void wgmma_fence(First&, Second&, SIM_SOURCE) {
  sim::wgmma_fence(source);
}

inline void wgmma_commit(SIM_SOURCE) { sim::wgmma_commit(source); }

template <int kPending>
void wgmma_wait(SIM_SOURCE) {
  sim::wgmma_wait(kPending, source);
}
template <int kPending, typename First>
void wgmma_wait(First&, SIM_SOURCE) {
  sim::wgmma_wait(kPending, source);
}
template <int kPending, typename First, typename Second>
void wgmma_wait(First&, Second&, SIM_SOURCE) {
  sim::wgmma_wait(kPending, source);
}

template <int kN, Major kMajorA = Major::k, Major kMajorB = Major::k>
void wgmma(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b, bool accumulate = true,
           SIM_SOURCE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  sim::wgmma(d, nullptr,
             {kN, false, kMajorA == Major::mn, kMajorB == Major::mn, accumulate, a.bits, b.bits},
             source);
}
template <int kN>
void wgmma_e4m3(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b, bool accumulate = true,
                SIM_SOURCE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  sim::wgmma(d, nullptr, {kN, false, false, false, accumulate, a.bits, b.bits, true}, source);
}
template <int kN, Major kMajorB = Major::k>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], MatrixDescriptor b, bool accumulate = true,
           SIM_SOURCE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  sim::wgmma(d, a, {kN, true, false, kMajorB == Major::mn, accumulate, 0, b.bits}, source);
}

}  // namespace dgemma::device
