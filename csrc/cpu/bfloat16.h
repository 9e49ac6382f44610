// bfloat16 as a storage type: 16 bits, converted to fp32 to compute.
#pragma once

#include <cstdint>
#include <cstring>

namespace dgemma {

struct bfloat16 {
  uint16_t bits;
};

// Everything below is compiled once per instruction set, so it must not be shared by the linker.
namespace {

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even. A NaN stays a NaN because its quiet bit is set after the cut.
inline bfloat16 round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <typename T>
inline T round_to(float x);
template <>
inline float round_to<float>(float x) {
  return x;
}
template <>
inline bfloat16 round_to<bfloat16>(float x) {
  return round_to_bfloat16(x);
}

}  // namespace
}  // namespace dgemma
