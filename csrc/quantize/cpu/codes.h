// Numbers to the nearest value of a format, and to its codes, sixteen at a time. Compiled once per
// instruction set; see cpu/vector.h for what that forbids.
//
// Sixteen values take sixteen sums whatever the vector's width, and nothing is fused
// (cmake/CpuVariants.cmake): every instruction set finds the same scales and codes.
#pragma once

#include "cpu/vector.h"
#include "dgemma/quantize.h"

namespace dgemma {
namespace {

constexpr int kBlock = 16;
constexpr int kParts = kBlock / kLanes;

// Sums of sixteen lanes, and their total: lane i with lane i + 8 first, down to one.
struct Sums {
  Floats part[kParts] = {};
  float total() const {
#if defined(__AVX2__)
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    const Eight eight = __builtin_shufflevector(part[0], part[0], 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(part[0], part[0], 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const Eight eight = part[0] + part[1];
#endif
    const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    const Four two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return two[0] + two[1];
#else
    float sums[kBlock];
    for (int p = 0; p < kParts; ++p) store(sums + p * kLanes, part[p]);
    for (int width = kBlock / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
#endif
  }
};

inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }
inline Floats with_sign_of(Floats magnitude, Floats x) {
  return (Floats)((Words)magnitude | ((Words)x & 0x80000000u));
}

// To the nearest multiple of `step`, a power of two, ties to the even multiple: above 2^23 steps a
// float has no fraction of one. |x| must be below 2^22 steps.
inline Floats round_to_multiple(Floats x, Floats step) {
  const Floats high = 12582912.0f * step;
  return (x + high) - high;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Scales as a format stores them, numbered in ascending order.
struct Bfloat16Scales {
  static constexpr int kLargest = 0x7f7f;
  static constexpr float kOfZeros = 0x1p-7f;  // where all of a group are zero: torch's eps
  static int nearest(float x) { return round_to_bfloat16(x).bits; }
  static float value(int number) { return from_bits(static_cast<uint32_t>(number) << 16); }
};
struct E4m3Scales {
  static constexpr int kLargest = 0x7e;  // 448
  static constexpr float kOfZeros = 0x1p-3f;
  static int nearest(float x) {
    if (x >= 448.0f) return kLargest;
    if (x < 0x1p-6f) return static_cast<int>((x + 0x1.8p14f) * 0x1p9f - 0x1.8p23f);
    const uint32_t bits = bits_of(x);
    return static_cast<int>((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120 << 3);
  }
  static float value(int number) {
    return number < 8 ? static_cast<float>(number) * 0x1p-9f
                      : from_bits(static_cast<uint32_t>(number + (120 << 3)) << 20);
  }
};

// kMost: what the largest magnitude of a group is scaled to where nothing is searched. kFrom, kTo:
// the scales that are searched, as multiples of that one: of their numbers every kStep-th, and then
// all beside the best of those.
struct Int4 {
  typedef Bfloat16Scales Scales;
  static constexpr float kMost = 7.5f;  // the middle of both ends of [-8, 7]
  static constexpr float kFrom = 0.5f, kTo = 1.16f;
  static constexpr int kStep = 4;
  static constexpr bool kTwoToAByte = true;
  static Floats nearest(Floats x) {
    return round_to_multiple(min(max(x, broadcast(-8.0f)), broadcast(7.0f)), broadcast(1.0f));
  }
  static Ints codes(Floats nearest) { return __builtin_convertvector(nearest, Ints) + 8; }
};

// The scales of a row are few, and its many columns leave little to choose.
struct Int8 {
  typedef Bfloat16Scales Scales;
  static constexpr float kMost = 127.5f;
  static constexpr float kFrom = 0.6f, kTo = 1.0f;
  static constexpr int kStep = 4;
  static constexpr bool kTwoToAByte = false;
  static Floats nearest(Floats x) {
    return round_to_multiple(min(max(x, broadcast(-128.0f)), broadcast(127.0f)), broadcast(1.0f));
  }
  static Ints codes(Floats nearest) { return __builtin_convertvector(nearest, Ints) & 0xff; }
};

// An octave above the usual scale: beyond it rounding repeats itself, below it values are cut off.
struct Fp8 {
  typedef Bfloat16Scales Scales;
  static constexpr float kMost = 448.0f;
  static constexpr float kFrom = 1.0f, kTo = 1.95f;
  static constexpr int kStep = 8;
  static constexpr bool kTwoToAByte = false;
  static Floats nearest(Floats x) {
    const Floats m = min(magnitude(x), broadcast(448.0f));
    const Words bits = (Words)m;
    const Floats normal = (Floats)((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
    const Floats small = round_to_multiple(m, broadcast(0x1p-9f));
    return with_sign_of(m < 0x1p-6f ? small : normal, x);
  }
  static Ints codes(Floats nearest) {
    const Floats m = magnitude(nearest);
    const Ints normal = (Ints)((Words)m >> 20) - (120 << 3);
    const Ints small = __builtin_convertvector(m * 0x1p9f, Ints);
    return (m < 0x1p-6f ? small : normal) | (Ints)(((Words)nearest >> 24) & 0x80u);
  }
};

struct Nvfp4 {
  typedef E4m3Scales Scales;
  static constexpr float kMost = 6.0f;
  // Up to where the largest value becomes 4, beside which there are more codes than beside 6.
  static constexpr float kFrom = 0.6f, kTo = 1.7f;
  static constexpr int kStep = 1;
  static constexpr bool kTwoToAByte = true;
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6
  static Floats nearest(Floats x) {
    const Floats m = min(magnitude(x), broadcast(6.0f));
    const Floats step = m < 2.0f ? broadcast(0.5f) : (m < 4.0f ? broadcast(1.0f) : broadcast(2.0f));
    return with_sign_of(round_to_multiple(m, step), x);
  }
  static Ints codes(Floats nearest) {
    const Floats m = magnitude(nearest);
    const Floats code = m < 2.0f ? m * 2.0f : (m < 4.0f ? m + 2.0f : m * 0.5f + 4.0f);
    return __builtin_convertvector(code, Ints) | (Ints)(((Words)nearest >> 28) & 8u);
  }
};

// Sixteen codes to memory: one to a byte, or two with the even column in the low half.
template <typename Format>
inline void store_codes(const Ints (&codes)[kParts], int64_t count, uint8_t* to) {
  int32_t all[kBlock];
  std::memcpy(all, codes, sizeof all);
  if constexpr (Format::kTwoToAByte) {
    for (int64_t i = 0; i < count; i += 2)
      to[i / 2] = static_cast<uint8_t>(all[i] | all[i + 1] << 4);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(all[i]);
  }
}

}  // namespace
}  // namespace dgemma
