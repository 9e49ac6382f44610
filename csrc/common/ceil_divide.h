#pragma once

#include "common/host_device.h"

namespace dgemma {

// a / b rounded up, for integers a >= 0 and b > 0 whose sum does not overflow.
template <typename A, typename B>
DGEMMA_HOST_DEVICE constexpr auto ceil_divide(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace dgemma
