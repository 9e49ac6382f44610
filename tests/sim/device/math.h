// The special function unit, more exact than the device's (but for tanh). See csrc/device/math.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

namespace {
// Subnormal numbers count as zero.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace

inline float exp2_approximate(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_approximate(float x) { return std::log2(flushed(x)); }
// Rounded to 11 bits, about what the device gives.
inline float tanh_approximate(float x) {
  return __uint_as_float((__float_as_uint(std::tanh(x)) + 0x800u) & ~0xfffu);
}
inline float reciprocal_approximate(float x) { return flushed(1.0f / flushed(x)); }
inline float reciprocal_sqrt_approximate(float x) { return 1.0f / std::sqrt(flushed(x)); }

}  // namespace dgemma::device
