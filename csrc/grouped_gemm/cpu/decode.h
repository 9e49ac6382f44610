// Weights of 4 and 8 bits to the values that products are made of, a row at a time. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
//
// A 4-bit code has sixteen meanings under one scale, so every group of columns makes a table of
// them, already rounded, and its codes look them up: by a permutation of a register where there is
// one.
#pragma once

#include "cpu/vector.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/weight_format.h"

namespace dgemma {
namespace {

// 4 exponent bits with bias 7, 3 of mantissa. 0x7f is NaN and does not get here: loading refuses
// it.
inline float e4m3_to_float(uint8_t code) {
  const uint32_t bits = (code & 0x7fu) << 20;
  float value;
  if (bits < 1u << 23) {
    value = static_cast<float>(code & 7) * 0x1p-9f;
  } else {
    const uint32_t moved = bits + (120u << 23);  // biases of 127 and of 7
    std::memcpy(&value, &moved, sizeof value);
  }
  return code & 0x80 ? -value : value;
}

// A code in each lane.
inline Floats e4m3_to_float(Words code) {
  const Floats normal = (Floats)(((code & 0x7fu) << 20) + (120u << 23));
  const Floats small = __builtin_convertvector((Ints)(code & 7u), Floats) * 0x1p-9f;
  const Floats magnitude = (code & 0x78u) == 0u ? small : normal;
  return (Floats)((Words)magnitude | (code & 0x80u) << 24);
}

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude < 0x400u) {  // below the smallest normal number
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  // Biases of 127 and of 15; infinite and NaN keep the largest exponent.
  const uint32_t exponent = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;
  const uint32_t bits = sign | ((magnitude << 13) + exponent);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// kLanes numbers of type float16.
inline Floats load_halves(const uint8_t* from) {
#if defined(__AVX512F__)
  __m256i halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, halves);
#elif defined(__AVX2__)
  __m128i halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)_mm256_cvtph_ps(halves);
#else
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return broadcast(half_to_float(bits));
#endif
}

#if defined(__AVX2__)
// kLanes bytes, one in each lane. On AVX-512 the form that takes a mask, as below: GCC 12 warns of
// its own header in those without (bug 105593).
inline Words widen_bytes(const uint8_t* bytes) {
#if defined(__AVX512F__)
  __m128i loaded;
  std::memcpy(&loaded, bytes, kLanes);
  return (Words)_mm512_maskz_cvtepu8_epi32(0xffff, loaded);
#else
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#endif
}
#endif

// The values of the sixteen codes before their scale.
constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kE2m1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Columns that a table looks up at a time, two in a byte: a register of bfloat16.
#if defined(__AVX512BW__)
constexpr int64_t kCodes = 32;
#else
constexpr int64_t kCodes = 16;
#endif

#if defined(__AVX512BW__)
typedef uint16_t Words32 __attribute__((vector_size(64)));

// The functions below use the masked forms of instructions: GCC 12 warns of its own header in those
// without (bug 105593).

// table[index % 32] and table[index % 16], lane by lane.
inline Words32 permute(Words32 index, Words32 table) {
  return (Words32)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)index, (__m512i)table);
}
inline Floats permute(Words index, Floats table) {
  return (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)table);
}

// Rounds both to bfloat16, low first, in registers throughout: a load that reads across two stores
// just made waits for both.
inline Words32 round_pair(Floats low, Floats high) {
#if defined(__AVX512BF16__)
  return (Words32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  const auto rounded = [](Floats v) __attribute__((always_inline)) {
    const Words bits = (Words)v;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
  };
  return __builtin_shufflevector(rounded(low), rounded(high), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
                                 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
                                 29, 30, 31);
#endif
}

// Sixteen bytes as 32 numbers of 4 bits in the order of the columns: the low half of a byte stays
// in the low word, the high half is moved to the high word.
inline Words32 spread_codes(const uint8_t* codes) {
  const Words bytes = widen_bytes(codes);
  return (Words32)((bytes | bytes << 12) & 0x000f000fu);
}

// The sixteen values under one scale, rounded to T, in a register.
template <typename T>
struct Table;

template <>
struct Table<bfloat16> {
  Words32 words;
  Table(const float* values, float scale) {
    const Floats scaled = load(values) * scale;
    words = round_pair(scaled, scaled);
  }
  void look_up(const uint8_t* codes, bfloat16* to) const {
    const Words32 result = permute(spread_codes(codes), words);
    std::memcpy(to, &result, sizeof result);
  }
};

template <>
struct Table<float> {
  Floats values;
  Table(const float* unscaled, float scale) : values(load(unscaled) * scale) {}
  void look_up(const uint8_t* codes, float* to) const {
    const Words bytes = widen_bytes(codes);
    // A permutation looks at the low four bits alone.
    const Floats even = permute(bytes, values), odd = permute(bytes >> 4, values);
    store(to, __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                      23));
    store(to + kLanes, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                               29, 14, 30, 15, 31));
  }
};
#else
// The sixteen values under one scale, rounded to T, in memory.
template <typename T>
struct Table {
  alignas(64) T of[16];
  Table(const float* values, float scale) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += kLanes) store(of + i, load(values + i) * scale);
  }
  void look_up(const uint8_t* codes, T* to) const {
    for (int64_t i = 0; i < kCodes; i += 2) {
      to[i] = of[codes[i / 2] & 15];
      to[i + 1] = of[codes[i / 2] >> 4];
    }
  }
};

#if defined(__AVX2__)
// A permutation of bytes looks up low and high halves of the words apart.
template <>
inline void Table<bfloat16>::look_up(const uint8_t* codes, bfloat16* to) const {
  __m128i words[2];
  std::memcpy(words, of, sizeof words);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i mask = _mm_set1_epi16(0xff), low_half = _mm_set1_epi8(15);
  const __m128i low =
      _mm_packus_epi16(_mm_and_si128(words[0], mask), _mm_and_si128(words[1], mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(words[0], 8), _mm_srli_epi16(words[1], 8));
  const __m128i index = _mm_unpacklo_epi8(_mm_and_si128(bytes, low_half),
                                          _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half));
  const __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
  const __m128i result[2] = {_mm_unpacklo_epi8(l, h), _mm_unpackhi_epi8(l, h)};
  std::memcpy(to, result, sizeof result);
}
#endif
#endif

// The first `columns` (even, fewer than kCodes) of a run that is cut short.
template <typename T>
inline void look_up_some(const Table<T>& table, const uint8_t* codes, int64_t columns, T* to) {
  uint8_t padded[kCodes / 2] = {};
  T values[kCodes];
  std::memcpy(padded, codes, static_cast<size_t>(columns / 2));
  table.look_up(padded, values);
  std::memcpy(to, values, static_cast<size_t>(columns) * sizeof(T));
}

// kCodes codes. Exact in every type. The row scale of fp8 weights is multiplied into the finished
// sums.
template <typename T>
inline void decode_e4m3(const uint8_t* codes, T* to) {
#if defined(__AVX2__)
#pragma GCC unroll 4
  for (int64_t i = 0; i < kCodes; i += kLanes) store(to + i, e4m3_to_float(widen_bytes(codes + i)));
#else
  for (int64_t i = 0; i < kCodes; ++i) to[i] = round_to<T>(e4m3_to_float(codes[i]));
#endif
}

#if defined(__AVX512BW__)
template <>
__attribute__((always_inline)) inline void decode_e4m3<bfloat16>(const uint8_t* codes,
                                                                 bfloat16* to) {
  // The eight numbers without an exponent, m / 512.
  Words32 small = {};
  for (int m = 1; m < 8; ++m)
    small[m] = round_to<bfloat16>(e4m3_to_float(static_cast<uint8_t>(m))).bits;
  static_assert(kCodes == 32);
  __m256i bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  // The sign is moved along to the top.
  const Words32 code = (Words32)_mm512_maskz_cvtepi8_epi16(~0u, bytes);
  const Words32 normal = ((code << 4) & 0x07f0) + (120 << 7);
  const Words32 magnitude = (code & 0x78) == 0 ? permute(code, small) : normal;
  const Words32 result = magnitude | (code & 0x8000);
  std::memcpy(to, &result, sizeof result);
}
#endif

// Columns that share a scale of the format NVFP4.
constexpr int64_t kNvfp4Group = 16;

// Bytes of a scale.
template <dgemma_weight_format kFormat>
constexpr int64_t kScaleBytes = describe(kFormat).scale_bytes;

// Scales in a row of so many columns.
template <dgemma_weight_format kFormat>
inline int64_t count_scales(int64_t columns, int64_t group) {
  return kScaleBytes<kFormat> == 0 ? 0 : (columns + group - 1) / group;
}

// `count` scales as floats. Converted one by one they would take as long as the codes.
template <dgemma_weight_format kFormat>
inline void convert_scales(const uint8_t* scales, int64_t count, dgemma_dtype dtype, float* to) {
  if constexpr (kFormat == DGEMMA_WEIGHTS_INT4) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store(to + i, dtype == DGEMMA_BFLOAT16 ? load(reinterpret_cast<const bfloat16*>(scales) + i)
                                             : load_halves(scales + 2 * i));
    for (; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, scales + 2 * i, sizeof bits);
      to[i] = dtype == DGEMMA_BFLOAT16 ? to_float(bfloat16{bits}) : half_to_float(bits);
    }
  } else if constexpr (kFormat == DGEMMA_WEIGHTS_NVFP4) {
    int64_t i = 0;
    for (; i + kCodes <= count; i += kCodes) decode_e4m3(scales + i, to + i);
    for (; i < count; ++i) to[i] = e4m3_to_float(scales[i]);
  } else {
    static_assert(kScaleBytes<kFormat> == 0);
  }
}

// kCodes columns from their codes, under the scale or, of NVFP4, the scales at `scale`.
template <dgemma_weight_format kFormat, typename T>
__attribute__((always_inline)) inline void decode_run(const uint8_t* codes, const float* scale,
                                                      T* to) {
  if constexpr (kFormat == DGEMMA_WEIGHTS_FP8) {
    decode_e4m3(codes, to);
  } else if constexpr (kFormat == DGEMMA_WEIGHTS_INT4) {
    Table<T>(kInt4Values, *scale).look_up(codes, to);
  } else {
    static_assert(kFormat == DGEMMA_WEIGHTS_NVFP4);
#if defined(__AVX512BW__)
    // The tables of two groups fill one register of 32 words, and the codes of the second group
    // look into its upper half.
    if constexpr (sizeof(T) == sizeof(bfloat16)) {
      Words32 offset = {};
      for (int i = 16; i < 32; ++i) offset[i] = 16;
      const Floats unscaled = load(kE2m1Values);
      const Words32 tables = round_pair(unscaled * scale[0], unscaled * scale[1]);
      const Words32 result = permute(spread_codes(codes) | offset, tables);
      std::memcpy(to, &result, sizeof result);
      return;
    }
#endif
    for (int64_t i = 0; i < kCodes; i += kNvfp4Group)
      look_up_some(Table<T>(kE2m1Values, scale[i / kNvfp4Group]), codes + i / 2, kNvfp4Group,
                   to + i);
  }
}

// A whole row; `scales` as convert_scales gives them.
template <dgemma_weight_format kFormat, typename T>
inline void decode_row(const uint8_t* codes, const float* scales, int64_t group, int64_t columns,
                       T* to) {
  constexpr bool kHasScales = kScaleBytes<kFormat> > 0;
  const auto codes_of = [&](int64_t column) { return codes + row_bytes(kFormat, column); };
  const auto scale_of = [&](int64_t column) {
    return kHasScales ? scales + static_cast<uint32_t>(column) / static_cast<uint32_t>(group)
                      : nullptr;
  };
  int64_t column = 0;
  for (; column + kCodes <= columns; column += kCodes)
    decode_run<kFormat>(codes_of(column), scale_of(column), to + column);
  if (column == columns) return;
  // The end of a row that is no whole run: what lies behind it is not read.
  const int64_t left = columns - column;
  uint8_t padded[kCodes] = {};
  float last_scales[2] = {};
  T decoded[kCodes];
  std::memcpy(padded, codes_of(column), static_cast<size_t>(row_bytes(kFormat, left)));
  if (kHasScales) last_scales[0] = *scale_of(column);
  decode_run<kFormat>(padded, last_scales, decoded);
  std::memcpy(to + column, decoded, static_cast<size_t>(left) * sizeof(T));
}

}  // namespace
}  // namespace dgemma
