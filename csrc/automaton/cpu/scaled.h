// Numbers of any magnitude: a path through a canvas has the product of 256 probabilities, which a
// double cannot hold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dgemma {

// mantissa * 2^exponent; the mantissa is 0 or in [1, 2).
struct Scaled {
  double mantissa = 0.0;
  int32_t exponent = 0;
};

inline Scaled scaled(double value, int64_t exponent = 0) {
  if (!(value > 0.0)) return {};
  int shift;
  const double half = std::frexp(value, &shift);
  return {half * 2.0, static_cast<int32_t>(exponent + shift - 1)};
}

// value * e^x
inline Scaled scaled_exponential(double value, double x) {
  const double in_twos = x * 1.4426950408889634074;
  const double whole = std::floor(in_twos);
  return scaled(value * std::exp2(in_twos - whole), static_cast<int64_t>(whole));
}

// 2^e for e of at most 1,023; 0 where that is no normal number.
inline double power_of_two(int64_t e) {
  if (e < -1022) return 0.0;
  const auto bits = static_cast<uint64_t>(e + 1023) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// A sum whose exponent is that of its largest term so far.
struct ScaledSum {
  double total = 0.0;
  int64_t exponent = 0;

  // Adds mantissa * 2^e.
  void add(double mantissa, int64_t e) {
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
  void add_product(const Scaled& a, const Scaled& b) {
    add(a.mantissa * b.mantissa, int64_t{a.exponent} + b.exponent);
  }
  Scaled value() const { return scaled(total, exponent); }
};

}  // namespace dgemma
