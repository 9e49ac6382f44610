// Rounding of tokens to int8, each under a scale of its own. Compiled once per instruction set; see
// cpu/vector.h for what that forbids.
#pragma once

#include "cpu/vector.h"
#include "grouped_gemm/cpu/int8_tokens.h"

namespace dgemma {
namespace {

// VNNI multiplies unsigned bytes by signed ones: the weights are made unsigned by 128, which the
// token's offset takes back. Without it weights and codes are multiplied in 16 bits, whose pairs of
// products do not overflow 32.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef int16_t TokenCode;
#else
typedef int8_t TokenCode;
#endif
static_assert(sizeof(TokenCode) <= kMostInt8CodeBytes);
constexpr float kLargestCode = 127.0f;

// To the nearest integer, ties to even.
inline Ints round_to_int(Floats x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#else
  return (Ints)(x + 12582912.0f) - 0x4b400000;  // compiled without contraction
#endif
}

// Where row t of so many columns begins.
inline TokenCode* codes_of(const Int8Tokens& tokens, int64_t t, int64_t columns) {
  return static_cast<TokenCode*>(tokens.codes) + t * int8_stride(columns);
}

// A token divided by its largest magnitude / 127, to the nearest; `to` is filled up with zeros. One
// with a value that is not finite has no codes and the scale NaN, so that its products are NaN.
template <typename T>
inline Int8Token round_token(const T* x, int64_t columns, TokenCode* to) {
  typedef TokenCode Codes __attribute__((vector_size(sizeof(TokenCode) * kLanes)));
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    return i + kLanes <= columns ? load(x + i) : load_partial(x + i, columns - i);
  };
  // Magnitudes compared as integers: their order is that of the numbers, and NaN is the largest.
  Ints largest = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Ints magnitude = (Ints)at(i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
  constexpr int32_t kInfinity = 0x7f800000;
  if (bits >= kInfinity) {
    std::memset(to, 0, sizeof(TokenCode) * static_cast<size_t>(int8_stride(columns)));
    return {__builtin_nanf(""), 0};
  }
  float most;
  std::memcpy(&most, &bits, sizeof most);
  const float inverse = most > 0.0f ? kLargestCode / most : 0.0f;
  Words sum = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Ints codes = round_to_int(at(i) * inverse);
    sum += (Words)codes;
    const Codes narrow = __builtin_convertvector(codes, Codes);
    const int64_t left = columns - i;
    std::memcpy(to + i, &narrow,
                sizeof(TokenCode) * static_cast<size_t>(left < kLanes ? left : kLanes));
  }
  for (int64_t i = columns; i < int8_stride(columns); ++i) to[i] = 0;
  uint32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return {most / kLargestCode, static_cast<int32_t>(128 * total)};
}

template <typename T>
void int8_round_task(const void* rows, int64_t first, int64_t end, int64_t columns,
                     const Int8Tokens& to) {
  for (int64_t t = first; t < end; ++t)
    to.tokens[t] =
        round_token(static_cast<const T*>(rows) + t * columns, columns, codes_of(to, t, columns));
}

}  // namespace
}  // namespace dgemma
