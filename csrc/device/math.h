// The approximations of the special function unit. Their largest errors stand in the PTX ISA,
// "Floating Point Instructions"; a test of a kernel that uses one has to allow for it. Subnormal
// inputs and results become zero.
#pragma once

#include "device/language.h"

namespace dgemma::device {

// 2^x, relative error at most 2^-22.
DGEMMA_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), absolute error at most 2^-22 for x in (0.5, 2), relative error 2^-22 elsewhere.
DGEMMA_DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x), relative error at most 2^-11: too coarse where the result decides a tie.
DGEMMA_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, at most 1 ulp off.
DGEMMA_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x), relative error at most 2^-22.4.
DGEMMA_DEVICE float reciprocal_sqrt_approximate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dgemma::device
