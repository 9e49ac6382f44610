// The inner loop of both products: some tokens times some weight rows, all dot products along
// contiguous k. Included by cpu/moe_kernel.h; compiled once per instruction set.
//
// Each dot product has an accumulator register of its own, fed in steps along k and folded at the
// end in a fixed tree, so its bits do not depend on which tokens and rows share the tile.
#pragma once

#include "cpu/vector.h"

namespace dgemma {
namespace {

// A tile takes two runs of kHalfRows weight rows (gate and up; or one run after the other of down)
// and up to kTileTokens tokens: as many accumulators as leave registers for the weights of a step.
#if defined(__AVX512F__)
constexpr int kTileTokens = 4;  // 24 accumulators + 6 weights + 1 token of 32 registers
constexpr int kHalfRows = 3;
#elif defined(__AVX2__)
constexpr int kTileTokens = 2;  // 8 accumulators + 2 weights + 4 tokens (even, odd) of 16
constexpr int kHalfRows = 2;
#else
constexpr int kTileTokens = 2;
constexpr int kHalfRows = 2;
#endif

// A step along k: how many values it takes, how they are loaded, and the product-sum.
// `load_partial` takes the first n values and zeros, and reads nothing beyond.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int64_t kValues = kLanes;
  typedef Floats Values;
  static Values load(const float* p) { return dgemma::load(p); }
  static Values load_partial(const float* p, int64_t n) { return dgemma::load_partial(p, n); }
  static Floats multiply_add(Values w, Values x, Floats sum) { return fmadd(w, x, sum); }
};

// A bf16 step reads a register of value pairs. One instruction multiplies them and adds each pair
// to its lane, where there is one; else even and odd values are widened by a shift and a mask.
template <>
struct Step<bfloat16> {
  static constexpr int64_t kValues = 2 * kLanes;
#if defined(__AVX512BF16__)
  typedef __m512bh Values;
  static Values load(const bfloat16* p) {
    Values v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Floats multiply_add(Values w, Values x, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x);
  }
#else
  struct Values {
    Floats even;
    Floats odd;
  };
  static Values load(const bfloat16* p) {
    Words pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
  }
  static Floats multiply_add(Values w, Values x, Floats sum) {
    return fmadd(w.odd, x.odd, fmadd(w.even, x.even, sum));
  }
#endif
  static Values load_partial(const bfloat16* p, int64_t n) {
    bfloat16 padded[kValues] = {};
    std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(bfloat16));
    return load(padded);
  }
};

// Steps after which the scalar variant puts its sums aside and begins anew: without lanes one
// register would take all products in turn, and lose several times what a sum by blocks loses.
[[maybe_unused]] constexpr int64_t kStepsPerSum = 32;

// Prefetches memory while a tile computes: `lines` cache lines of two streams at every step. The
// processor's own prefetcher stops at each 4 KiB page and at short rows; see LOG.md.
constexpr int64_t kLineBytes = 64;
struct Prefetcher {
  const char* first;
  const char* second;
  int64_t lines;

  void step() {
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(first, 0, 2);  // into the second-level cache
      __builtin_prefetch(second, 0, 2);
      first += kLineBytes;
      second += kLineBytes;
    }
  }
};

// fold<w>(a, b): in each run of 2w lanes, lane i plus lane i + w; the sums of a and of b share the
// result. Four (three) levels turn 16 (8) accumulators into one register of their sums.
#if defined(__AVX512F__)
template <typename Vector>
inline Vector fold8(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                 31);
}
template <typename Vector>
inline Vector fold4(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
template <typename Vector>
inline Vector fold2(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
template <typename Vector>
inline Vector fold1(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
// The lane that input i's sum ends in.
constexpr int folded_lane(int i) { return (i & 3) * 4 + ((i >> 3) & 1) * 2 + ((i >> 2) & 1); }
#elif defined(__AVX2__)
template <typename Vector>
inline Vector fold4(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
template <typename Vector>
inline Vector fold2(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
         __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
template <typename Vector>
inline Vector fold1(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
constexpr int folded_lane(int i) { return (i & 1) * 4 + ((i >> 2) & 1) * 2 + ((i >> 1) & 1); }
#else
constexpr int folded_lane(int i) { return i; }
#endif

// The sums of `count` (at most kLanes) accumulators; sum i is in lane folded_lane(i), the other
// lanes repeat some of them.
template <int count, typename Vector>
__attribute__((always_inline)) inline Vector fold_all(const Vector* sums) {
  static_assert(count >= 1 && count <= kLanes);
#if defined(__AVX2__)
  Vector level[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) level[i] = sums[i];
  int n = count;
  auto halve = [&](auto fold) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < (n + 1) / 2; ++i)
      level[i] = fold(level[2 * i], level[2 * i + 1 < n ? 2 * i + 1 : 2 * i]);
    n = (n + 1) / 2;
  };
#if defined(__AVX512F__)
  halve(fold8<Vector>);
#endif
  halve(fold4<Vector>);
  halve(fold2<Vector>);
  halve(fold1<Vector>);
  return level[0];
#else
  return sums[0];
#endif
}

// Registers that hold the sums of one half of a tile.
constexpr int registers_for(int sums) { return (sums + kLanes - 1) / kLanes; }

// Dot products of kTokens tokens with rows first, first + stride, ... and second, second + stride,
// ... (kHalfRows each), all of length k. Sum t * kHalfRows + r goes to lane folded_lane(i % kLanes)
// of register i / kLanes. `prefetcher` runs meanwhile.
template <typename T, int kTokens>
__attribute__((always_inline)) inline void dot_tile(const T* const* tokens, const T* first,
                                                    const T* second, int64_t stride, int64_t k,
                                                    Prefetcher& prefetcher, Floats* first_sums,
                                                    Floats* second_sums) {
  typedef typename Step<T>::Values Values;
  constexpr int kSums = kTokens * kHalfRows;
  Floats sums[2][kSums] = {};
  const T* x[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) x[t] = tokens[t];

  auto step = [&](auto load, int64_t i) __attribute__((always_inline)) {
    Values token[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) token[t] = load(x[t] + i);
#pragma GCC unroll 8
    for (int r = 0; r < kHalfRows; ++r) {
      const Values w0 = load(first + r * stride + i);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sums[0][t * kHalfRows + r] =
            Step<T>::multiply_add(w0, token[t], sums[0][t * kHalfRows + r]);
      const Values w1 = load(second + r * stride + i);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sums[1][t * kHalfRows + r] =
            Step<T>::multiply_add(w1, token[t], sums[1][t * kHalfRows + r]);
    }
  };
  [[maybe_unused]] Floats aside[2][kSums] = {};
  [[maybe_unused]] auto put_aside = [&]() __attribute__((always_inline)) {
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kSums; ++i) {
        aside[half][i] += sums[half][i];
        sums[half][i] = Floats{};
      }
  };
  const int64_t whole = k - k % Step<T>::kValues;
  Prefetcher next = prefetcher;  // in registers
  for (int64_t i = 0; i < whole; i += Step<T>::kValues) {
    next.step();
    step([](const T* p) __attribute__((always_inline)) { return Step<T>::load(p); }, i);
    if constexpr (kLanes == 1)
      if (i / Step<T>::kValues % kStepsPerSum == kStepsPerSum - 1) put_aside();
  }
  prefetcher = next;
  if (whole < k) {
    const int64_t rest = k - whole;
    step([rest](const T* p)
             __attribute__((always_inline)) { return Step<T>::load_partial(p, rest); },
         whole);
  }

  if constexpr (kLanes == 1)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kSums; ++i) sums[half][i] += aside[half][i];

  constexpr int kWhole = kSums / kLanes;
  constexpr int kRest = kSums % kLanes;
#pragma GCC unroll 16
  for (int i = 0; i < kWhole; ++i) {
    first_sums[i] = fold_all<kLanes>(sums[0] + i * kLanes);
    second_sums[i] = fold_all<kLanes>(sums[1] + i * kLanes);
  }
  if constexpr (kRest > 0) {
    first_sums[kWhole] = fold_all<kRest>(sums[0] + kWhole * kLanes);
    second_sums[kWhole] = fold_all<kRest>(sums[1] + kWhole * kLanes);
  }
}

}  // namespace
}  // namespace dgemma
