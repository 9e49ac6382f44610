// The vector that CPU kernels are written with: as many fp32 lanes as the instruction set's
// registers hold.
//
// A family's kernels are headers, compiled once per instruction set with that set's flags from a
// source file that cmake/CpuVariants.cmake writes: see cpu/variants.h.
// Everything has internal linkage: a function compiled for AVX-512 must never be the copy that the
// linker keeps for all. For the same reason kernels call no
// function template of the standard library.
//
// Arithmetic is that of GCC's vector extensions (+, -, *, /, comparisons, ?:), so one source serves
// all widths.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/bfloat16.h"

namespace dgemma {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 1;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints
    __attribute__((vector_size(4 * kLanes)));  // also the result of a comparison: 0 or -1
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }

// 0, 1, 2, ...
inline Ints lane_index() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512F__)
// GCC 12 makes two halves of the conversion and joins them; and without a mask it warns of its own
// header.
inline Floats widen(Halves h) {
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
}
#else
inline Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }
#endif

inline Floats load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}

// The first n < kLanes values; the other lanes are zero and are not read.
template <typename T>
inline Floats load_partial(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, NaN kept.
inline void store(bfloat16* p, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Words result = ((bits & 0x7fffffffu) > 0x7f800000u) ? quiet : rounded;
  const Halves h = __builtin_convertvector(result, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

template <typename T>
inline void store_partial(T* p, Floats v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// Rounds to T and back: the value that a store and a load would give.
template <typename T>
inline Floats rounded_to(Floats v);
template <>
inline Floats rounded_to<float>(Floats v) {
  return v;
}
template <>
inline Floats rounded_to<bfloat16>(Floats v) {
#if defined(__AVX512BF16__)
  return widen((Halves)_mm512_cvtneps_pbh((__m512)v));
#else
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words cut = ((bits & 0x7fffffffu) > 0x7f800000u) ? bits | 0x400000u : rounded;
  return (Floats)(cut & 0xffff0000u);
#endif
}

// a * b + c, fused where the machine can.
inline Floats fmadd(Floats a, Floats b, Floats c) { return a * b + c; }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

// Lane i with lane i + kLanes / 2 first, down to one: a fixed tree.
inline float sum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float maximum(Floats v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// e^x with a relative error below 3e-7 for x in [-87, 88]; below -87.3 the result is 0, above 88 it
// stays finite. x = k ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7
// (remainder 5e-9), ln 2 split in two (Cody and Waite) so that k ln 2 is subtracted without loss.
// NaN gives NaN.
inline Floats exp(Floats x) {
  const Floats clamped = min(max(x, broadcast(-88.0f)), broadcast(88.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const Ints k = (Ints)shifted - 0x4b400000;
  const Floats kf = shifted - 12582912.0f;
  Floats r = clamped - kf * 0.693145751953125f;
  r = r - kf * 1.428606765330187e-06f;
  Floats p = broadcast(1.0f / 5040);
  p = fmadd(p, r, broadcast(1.0f / 720));
  p = fmadd(p, r, broadcast(1.0f / 120));
  p = fmadd(p, r, broadcast(1.0f / 24));
  p = fmadd(p, r, broadcast(1.0f / 6));
  p = fmadd(p, r, broadcast(0.5f));
  p = fmadd(p, r, broadcast(1.0f));
  p = fmadd(p, r, broadcast(1.0f));
  const Floats scaled = (Floats)((Ints)p + (k << 23));
  const Floats flushed = x < -87.3f ? broadcast(0.0f) : scaled;
  return x == x ? flushed : x;
}

// tanh with an absolute error below 2e-7 and a relative one below 1e-6. For |x| < 0.25 the odd
// Taylor polynomial of degree 9 (remainder 4e-9 of x), because 1 - 2 / (e^2x + 1) cancels there;
// saturated beyond 10, where fp32 gives 1.
inline Floats tanh(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats e = exp(min(magnitude, broadcast(10.0f)) * 2.0f);
  const Floats far = 1.0f - 2.0f / (e + 1.0f);
  const Floats x2 = x * x;
  Floats p = broadcast(62.0f / 2835);
  p = fmadd(p, x2, broadcast(-17.0f / 315));
  p = fmadd(p, x2, broadcast(2.0f / 15));
  p = fmadd(p, x2, broadcast(-1.0f / 3));
  const Floats near = fmadd(p * x2, x, x);
  const Floats result = magnitude < 0.25f ? near : (x < 0.0f ? -far : far);
  return x == x ? result : x;
}

}  // namespace
}  // namespace dgemma
