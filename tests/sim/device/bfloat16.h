// bfloat16 on the host. See csrc/device/bfloat16.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Nearest even; the device's NaN.
inline bfloat16 round_to_bfloat16(float x) {
  uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  bits += 0x7fffu + (bits >> 16 & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline uint32_t pack_bfloat16(float low, float high) {
  return static_cast<uint32_t>(round_to_bfloat16(high).bits) << 16 | round_to_bfloat16(low).bits;
}

inline float low_to_float(uint32_t packed) { return __uint_as_float(packed << 16); }
inline float high_to_float(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

inline uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  return pack_bfloat16(
      sim::multiply_add_to_odd(low_to_float(a), low_to_float(b), low_to_float(c)),
      sim::multiply_add_to_odd(high_to_float(a), high_to_float(b), high_to_float(c)));
}

}  // namespace dgemma::device
