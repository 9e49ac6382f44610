// The activation of the experts' kernels, in the epilogue of a product.
//
// exp2 and the reciprocal are the special function unit's: consumer warps compute this between two
// tiles, and tensor cores wait for it. layer/cuda/gelu_product.cu, which is bound by its reads, has
// the form of torch's operator instead, so that its results can be compared bit by bit.
#pragma once

#include "device/math.h"

namespace dgemma {

// gelu_tanh(x) = x / 2 (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3).
DGEMMA_DEVICE float gelu_tanh(float x) {
  constexpr float kScale = -2.302208198f;  // -2 sqrt(2 / pi) log2(e)
  const float exponent = kScale * (x + 0.044715f * x * x * x);
  return x * device::reciprocal_approximate(1.0f + device::exp2_approximate(exponent));
}

}  // namespace dgemma
