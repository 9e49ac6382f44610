// Numbers of any magnitude: a path through a canvas has the product of 256 probabilities, which a
// double cannot hold. Both devices count with these.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace dgemma {

constexpr int32_t kMantissaBits = 52;

// mantissa * 2^exponent; the mantissa is 0 or in [1, 2). Sixteen bytes, which a GPU loads at once.
struct alignas(16) Scaled {
  double mantissa = 0.0;
  int32_t exponent = 0;
};

DGEMMA_HOST_DEVICE uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
DGEMMA_HOST_DEVICE double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^e for e of at most 1,023; 0 where that is no normal number.
DGEMMA_HOST_DEVICE double power_of_two(int64_t e) {
  return e < -1022 ? 0.0 : double_of(static_cast<uint64_t>(e + 1023) << kMantissaBits);
}

// value * 2^exponent
DGEMMA_HOST_DEVICE Scaled scaled(double value, int64_t exponent = 0) {
  if (!(value > 0.0)) return {};
  if (value < 0x1p-1022) {  // no normal number, which has no leading one
    value *= 0x1p54;
    exponent -= 54;
  }
  const uint64_t bits = bits_of(value);
  const uint64_t fraction = bits & ((uint64_t{1} << kMantissaBits) - 1);
  return {double_of(fraction | uint64_t{1023} << kMantissaBits),
          static_cast<int32_t>(exponent + static_cast<int64_t>(bits >> kMantissaBits) - 1023)};
}

// value * e^x
DGEMMA_HOST_DEVICE Scaled scaled_exponential(double value, double x) {
  const double in_twos = x * 1.4426950408889634074;
  const double whole = floor(in_twos);
  return scaled(value * exp2(in_twos - whole), static_cast<int64_t>(whole));
}

// A product as a number of the size that `all` has: a * b / all.
DGEMMA_HOST_DEVICE double share_of(const Scaled& a, const Scaled& b, const Scaled& all) {
  return a.mantissa * b.mantissa / all.mantissa *
         power_of_two(int64_t{a.exponent} + b.exponent - all.exponent);
}

// A sum whose exponent is that of its largest term so far.
struct ScaledSum {
  double total = 0.0;
  int64_t exponent = 0;

  // Adds mantissa * 2^e.
  DGEMMA_HOST_DEVICE void add(double mantissa, int64_t e) {
    if (!(mantissa > 0.0)) return;
    if (total == 0.0) {
      total = mantissa;
      exponent = e;
    } else if (e <= exponent) {
      total += mantissa * power_of_two(e - exponent);
    } else {
      total = mantissa + total * power_of_two(exponent - e);
      exponent = e;
    }
  }
  DGEMMA_HOST_DEVICE void add_product(const Scaled& a, const Scaled& b) {
    add(a.mantissa * b.mantissa, int64_t{a.exponent} + b.exponent);
  }
  DGEMMA_HOST_DEVICE Scaled value() const { return scaled(total, exponent); }
};

}  // namespace dgemma
