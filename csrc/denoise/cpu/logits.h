// Every kernel of the family reads a vocabulary tile through this header: raw logits become z in
// fp32, and z becomes mass, exp(z - a maximum), which is a probability before its division.
#pragma once

#include "cpu/vector.h"
#include "denoise/cpu/allowed.h"
#include "dgemma/denoise.h"

namespace dgemma {
namespace {

constexpr int kTile = DGEMMA_VOCABULARY_TILE;
// Masses below e^-104 are zero in fp32 (its smallest number is e^-103.3).
constexpr float kLeastExponent = -104.0f;

inline int64_t tiles_of(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

#if defined(__AVX2__)
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

struct Add {
  template <typename V>
  static V of(V a, V b) {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  static V of(V a, V b) {
    return a > b ? a : b;
  }
};

// Folds halves onto each other, the same tree whatever the width: lane i with lane i + width / 2.
template <typename Op>
inline float fold(Floats v) {
#if defined(__AVX512F__)
  const Floats8 eight = Op::of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const Floats8 eight = v;
#endif
  const Floats4 four = Op::of(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                              __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  const Floats4 two = Op::of(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return Op::of(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}

inline float horizontal_max(Floats v) { return fold<Larger>(v); }
inline float horizontal_sum(Floats v) { return fold<Add>(v); }
#else
inline float horizontal_max(Floats v) { return maximum(v); }
inline float horizontal_sum(Floats v) { return sum(v); }
#endif

// The larger and the smaller; b where one is NaN. One instruction, which the comparisons of
// vector.h do not always become.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return max(a, b);
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return min(a, b);
#endif
}

// d = k ln 2 + rest with |rest| <= ln 2 / 2.
struct Exponent {
  Floats shifted;  // k + 1.5 * 2^23: the sum rounds to the nearest integer, left in the low bits
  Floats k;
  Floats rest;
};

inline Exponent split_exponent(Floats d) {
  Exponent e;
  e.shifted = fmadd(d, broadcast(1.44269504088896341f), broadcast(12582912.0f));
  e.k = e.shifted - 12582912.0f;
#if defined(__FMA__)
  // One constant for ln 2 is enough: k times its error stays below 3e-7.
  e.rest = fmadd(e.k, broadcast(-0.693147180559945309f), d);
#else
  // The constant is cut in two (Cody and Waite), the first part so short that its product with k is
  // exact.
  e.rest = d - e.k * 0.693145751953125f - e.k * 1.428606765330187e-06f;
#endif
  return e;
}

// p * 2^k; without AVX-512 k is at least -126.
inline Floats power_of_two(Floats p, const Exponent& e) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)e.k);
#else
  return (Floats)((Ints)p + (((Ints)e.shifted - 0x4b400000) << 23));
#endif
}

// e^d for d <= 88, exactly 1 at 0 and exactly 0 far below; relative error 2e-7. The polynomial is
// the one of degree 5 with constant term 1 whose largest relative error on |r| <= ln 2 / 2 is
// least (9e-8).
inline Floats exponential(Floats d) {
#if !defined(__AVX512F__)
  const Floats exact_zero = d < -87.3f ? broadcast(0.0f) : broadcast(1.0f);
  d = larger(d, broadcast(-87.3f));
#endif
  const Exponent exponent = split_exponent(d);
  const Floats r = exponent.rest;
  Floats p = broadcast(0.0082903066650033f);
  p = fmadd(p, r, broadcast(0.0418979786336422f));
  p = fmadd(p, r, broadcast(0.1666763722896576f));
  p = fmadd(p, r, broadcast(0.4999915063381195f));
  p = fmadd(p, r, broadcast(0.9999997019767761f));
  p = fmadd(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return power_of_two(p, exponent);
#else
  return exact_zero * power_of_two(p, exponent);
#endif
}

// The sum of a tile's 128 values: 16 sums, then a tree over them, whatever the width of the vector.
struct TileSum {
  static constexpr int kParts = 16 / kLanes;
  Floats part[kParts] = {};

  // The values begin at index i.
  void add(int i, Floats v) { part[i / kLanes % kParts] += v; }
  void add_product(int i, Floats a, Floats b) {
    part[i / kLanes % kParts] = fmadd(a, b, part[i / kLanes % kParts]);
  }

  float total() {
    for (int width = kParts / 2; width > 0; width /= 2)
      for (int p = 0; p < width; ++p) part[p] += part[p + width];
    return horizontal_sum(part[0]);
  }
};

// exp(z - reference) where z may be -infinity; reference is finite and z not far above it.
inline Floats mass(Floats z, Floats reference) {
  return exponential(larger(z - reference, broadcast(kLeastExponent)));
}

// tanh(a * (inner + inner_low)) within 2 ulp: tanh x = -m / (2 + m) with m = e^(-2x) - 1,
// computed without cancelling: e^(-2x) = 2^k e^r, so m = 2^k (e^r - 1) + (2^k - 1). The polynomial
// is that of (e^r - 1) / r of degree 5 with constant term 1 whose largest relative error on
// |r| <= ln 2 / 2 is least (2e-8). Beyond x = 20, tanh is 1 in fp32.
inline Floats fast_tanh(Floats a, float inner, float inner_low) {
  const Words sign = (Words)a & 0x80000000u;
  const Floats magnitude = smaller((Floats)((Words)a ^ sign), broadcast(20.0f / inner));
  const Floats d = fmadd(magnitude, broadcast(-2.0f * inner), magnitude * (-2.0f * inner_low));
  const Exponent exponent = split_exponent(d);
  const Floats r = exponent.rest;
  Floats p = broadcast(0.0013882521307095885f);
  p = fmadd(p, r, broadcast(0.008366520516574383f));
  p = fmadd(p, r, broadcast(0.04166720062494278f));
  p = fmadd(p, r, broadcast(0.1666654348373413f));
  p = fmadd(p, r, broadcast(0.4999999701976776f));
  p = fmadd(p, r, broadcast(1.0f));
  const Floats power = power_of_two(broadcast(1.0f), exponent);
  const Floats m = fmadd(power, p * r, power - 1.0f);
  const Floats result = m / (m + 2.0f);  // -tanh of the magnitude
  return (Floats)((Words)result ^ sign ^ 0x80000000u);
}

// z = outer * tanh(inner * a), or outer * a without a cap. The factors are in two parts: rounding
// them to fp32 would move every z of a row in the same direction.
struct LogitScale {
  bool capped;
  float inner, inner_low;
  float outer, outer_low;
};

// The fp32 number next to x, and what is left of x.
inline void split(double x, float* high, float* low) {
  *high = static_cast<float>(x);
  *low = __builtin_isfinite(*high) ? static_cast<float>(x - *high) : 0.0f;
}

inline LogitScale logit_scale(const dgemma_logits& logits, int64_t request) {
  LogitScale scale = {};
  scale.capped = logits.softcap > 0.0f;
  const double cap = scale.capped ? logits.softcap : 1.0;
  split(1.0 / cap, &scale.inner, &scale.inner_low);
  split(cap / logits.temperature[request], &scale.outer, &scale.outer_low);
  return scale;
}

inline Floats scaled_logit(Floats a, const LogitScale& scale) {
  const Floats t = scale.capped ? fast_tanh(a, scale.inner, scale.inner_low) : a;
  return fmadd(t, broadcast(scale.outer), t * scale.outer_low);
}

// One row of logits.
template <typename T>
struct LogitRow {
  const T* raw;
  int64_t vocabulary;
  const int32_t* allowed;  // bit row, or NULL
  LogitScale scale;
};

template <typename T>
inline LogitRow<T> logit_row(const dgemma_logits& logits, int64_t row) {
  return {static_cast<const T*>(logits.raw) + row * logits.vocabulary, logits.vocabulary,
          allowed_bits(logits.allowed, logits.vocabulary, row),
          logit_scale(logits, row / logits.length)};
}

inline bool is_active(const dgemma_logits& logits, int64_t row) {
  return logits.active == nullptr || logits.active[row / logits.length] != 0;
}

// One tile read: z of its entries (-infinity where there is none, or it is not allowed), and the
// largest raw logit. poison becomes NaN when an allowed raw logit is not finite.
struct TileLogits {
  alignas(64) float z[kTile];
  Floats largest_z;
  Floats largest_raw;
  Floats poison;
};

inline void begin_tile(TileLogits* tile) {
  tile->largest_z = broadcast(-INFINITY);
  tile->largest_raw = broadcast(-INFINITY);
  tile->poison = broadcast(0.0f);
}

// True when no entry of the tile is allowed.
inline bool tile_is_empty(const int32_t* allowed, int64_t vocabulary, int64_t tile) {
  if (allowed == nullptr) return false;
  const int64_t first = tile * (kTile / 32), words = words_per_row(vocabulary);
  uint32_t any = 0;
  for (int64_t word = first; word < first + kTile / 32 && word < words; ++word)
    any |= allowed_word(allowed, vocabulary, word);
  return any == 0;
}

// A whole tile of which some entries are not allowed: those take part as if they were not there,
// whatever their raw logit.
template <typename T>
inline void read_masked_tile(const LogitRow<T>& row, int64_t tile, TileLogits* out) {
  const int64_t first = tile * kTile;
  const int32_t* const words = row.allowed + first / 32;
  for (int i = 0; i < kTile; i += kLanes) {
    const auto bits = static_cast<int32_t>(static_cast<uint32_t>(words[i / 32]) >> (i % 32));
    const Ints present = ((broadcast(bits) >> lane_index()) & 1) != 0;
    const Floats raw = load(row.raw + first + i);
    const Floats a = present ? raw : broadcast(0.0f);
    out->poison = fmadd(a, broadcast(0.0f), out->poison);
    const Floats z = present ? scaled_logit(a, row.scale) : broadcast(-INFINITY);
    out->largest_raw = larger(present ? raw : broadcast(-INFINITY), out->largest_raw);
    out->largest_z = larger(z, out->largest_z);
    store(out->z + i, z);
  }
}

// The same for entries of which some are not there, given their raw logits.
inline void read_present(float* raw, const bool* present, const LogitScale& scale,
                         TileLogits* out) {
  for (int i = 0; i < kTile; i += kLanes) {
    const Floats a = load(raw + i);
    out->poison = fmadd(a, broadcast(0.0f), out->poison);
    store(out->z + i, scaled_logit(a, scale));
  }
  for (int i = 0; i < kTile; ++i) {
    if (present[i]) continue;
    out->z[i] = -INFINITY;
    raw[i] = -INFINITY;
  }
  for (int i = 0; i < kTile; i += kLanes) {
    out->largest_z = larger(load(out->z + i), out->largest_z);
    out->largest_raw = larger(load(raw + i), out->largest_raw);
  }
}

// The same for a tile that ends beyond the vocabulary.
template <typename T>
inline void read_partial_tile(const LogitRow<T>& row, int64_t tile, TileLogits* out) {
  alignas(64) float raw[kTile];
  bool present[kTile];
  const int64_t first = tile * kTile;
  for (int i = 0; i < kTile; ++i) {
    present[i] = first + i < row.vocabulary && is_allowed(row.allowed, first + i);
    raw[i] = present[i] ? to_float(row.raw[first + i]) : 0.0f;
  }
  read_present(raw, present, row.scale, out);
}

template <typename T, bool kCapped>
inline void read_whole_tile(const T* raw, LogitScale scale, TileLogits* out) {
  scale.capped = kCapped;
  Floats largest_z = out->largest_z, largest_raw = out->largest_raw, poison = out->poison;
  for (int i = 0; i < kTile; i += kLanes) {
    const Floats a = load(raw + i);
    const Floats z = scaled_logit(a, scale);
    largest_raw = larger(a, largest_raw);
    largest_z = larger(z, largest_z);
    poison = fmadd(a, broadcast(0.0f), poison);
    store(out->z + i, z);
  }
  out->largest_z = largest_z;
  out->largest_raw = largest_raw;
  out->poison = poison;
}

// Reads a tile that is not empty. The same entries give the same bits in every kernel.
template <typename T>
inline void read_tile(const LogitRow<T>& row, int64_t tile, TileLogits* out) {
  begin_tile(out);
  const int64_t first = tile * kTile;
  if (first + kTile > row.vocabulary)
    read_partial_tile(row, tile, out);
  else if (row.allowed != nullptr)
    read_masked_tile(row, tile, out);
  else if (row.scale.capped)
    read_whole_tile<T, true>(row.raw + first, row.scale, out);
  else
    read_whole_tile<T, false>(row.raw + first, row.scale, out);
}

// exp(tile_max - row_max) of up to kFactors consecutive tiles. A row's mass is tile_sum times this
// factor, both fp32, multiplied and added in double.
constexpr int kFactors = 16;

inline void tile_factors(const float* tile_max, int64_t tiles, float row_max, float* factors) {
  float padded[kFactors];
  for (int i = 0; i < kFactors; ++i) padded[i] = i < tiles ? tile_max[i] : -INFINITY;
  for (int i = 0; i < kFactors; i += kLanes)
    store(factors + i, mass(load(padded + i), broadcast(row_max)));
}

}  // namespace
}  // namespace dgemma
