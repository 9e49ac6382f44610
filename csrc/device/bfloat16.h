// bfloat16 on the device: 16 bits in memory, two of them in a register, fp32 for arithmetic.
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct bfloat16 {
  uint16_t bits;
};

DGEMMA_DEVICE float to_float(bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

// cvt.rn.bf16x2.f32 rounds two floats to nearest even and packs them: its first source goes to the
// upper half. PTX ISA, "Data Movement and Conversion Instructions: cvt".
DGEMMA_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DGEMMA_DEVICE bfloat16 round_to_bfloat16(float x) {
  return {static_cast<uint16_t>(pack_bfloat16(x, 0.0f) & 0xffffu)};
}

DGEMMA_DEVICE float low_to_float(uint32_t packed) { return __uint_as_float(packed << 16); }
DGEMMA_DEVICE float high_to_float(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

// a b + c of both halves, each rounded once to nearest even; subnormal numbers count. PTX ISA,
// "Half Precision Floating Point Instructions: fma" (.bf16x2, sm_80).
DGEMMA_DEVICE uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace dgemma::device
