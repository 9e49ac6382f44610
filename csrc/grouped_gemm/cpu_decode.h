// Weights of 4 and 8 bits to the values that products are made of, a row at a time. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
//
// A 4-bit code has sixteen meanings under one scale, so every group of columns makes a table of
// them, already rounded, and its codes look them up: by a permutation of a register where there is
// one.
#pragma once

#include "cpu/vector.h"
#include "dgemma/grouped_gemm.h"

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

// What the sixteen codes stand for before their scale.
constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kE2m1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The sixteen values under one scale, rounded to T.
template <typename T>
struct Table {
  alignas(64) T of[16];
  Table(const float* values, float scale) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += kLanes) store(of + i, load(values + i) * scale);
  }
};

// Columns [0, columns) from their codes, two in a byte; `columns` is even. The vector forms take
// kCodes at a time and leave the rest to look_up.
template <typename T>
inline void look_up(const Table<T>& table, const uint8_t* codes, int64_t columns, T* to) {
  for (int64_t i = 0; i < columns; i += 2) {
    to[i] = table.of[codes[i / 2] & 15];
    to[i + 1] = table.of[codes[i / 2] >> 4];
  }
}

#if defined(__AVX512BW__)
constexpr int64_t kCodes = 32;
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef uint16_t Words32 __attribute__((vector_size(64)));

// table[index % 32] and table[index % 16], lane by lane. The forms with a mask, because GCC 12
// warns of its own header in those without (bug 105593).
inline Words32 permute(Words32 index, Words32 table) {
  return (Words32)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)index, (__m512i)table);
}
inline Floats permute(Words index, Floats table) {
  return (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)table);
}

// Sixteen bytes, one in each lane.
inline Words spread_bytes(const uint8_t* codes) {
  Bytes16 bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  return __builtin_convertvector(bytes, Words);
}

// Sixteen bytes as 32 numbers of 4 bits in the order of the columns: the low half of a byte stays
// in the low word, the high half is moved to the high word.
inline Words32 spread_codes(const uint8_t* codes) {
  const Words bytes = spread_bytes(codes);
  return (Words32)((bytes | bytes << 12) & 0x000f000fu);
}

inline void look_up_codes(const Table<bfloat16>& table, const uint8_t* codes, bfloat16* to) {
  Words32 words = {};
  std::memcpy(&words, table.of, sizeof table.of);
  const Words32 result = permute(spread_codes(codes), words);
  std::memcpy(to, &result, sizeof result);
}

inline void look_up_codes(const Table<float>& table, const uint8_t* codes, float* to) {
  const Floats values = load(table.of);
  const Words bytes = spread_bytes(codes);
  const Floats even = permute(bytes, values), odd = permute(bytes >> 4, values);
  store(to,
        __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(to + kLanes, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                             29, 14, 30, 15, 31));
}
#elif defined(__AVX2__)
constexpr int64_t kCodes = 32;

// A permutation of bytes looks up low and high halves of the words apart.
inline void look_up_codes(const Table<bfloat16>& table, const uint8_t* codes, bfloat16* to) {
  __m128i words[2], bytes;
  std::memcpy(words, table.of, sizeof words);
  std::memcpy(&bytes, codes, sizeof bytes);
  const __m128i mask = _mm_set1_epi16(0xff), low_nibble = _mm_set1_epi8(15);
  const __m128i low =
      _mm_packus_epi16(_mm_and_si128(words[0], mask), _mm_and_si128(words[1], mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(words[0], 8), _mm_srli_epi16(words[1], 8));
  const __m128i even = _mm_and_si128(bytes, low_nibble);
  const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_nibble);
  const __m128i index[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
  for (int i = 0; i < 2; ++i) {
    const __m128i l = _mm_shuffle_epi8(low, index[i]), h = _mm_shuffle_epi8(high, index[i]);
    const __m128i result[2] = {_mm_unpacklo_epi8(l, h), _mm_unpackhi_epi8(l, h)};
    std::memcpy(to + 16 * i, result, sizeof result);
  }
}

inline void look_up_codes(const Table<float>& table, const uint8_t* codes, float* to) {
  look_up(table, codes, kCodes, to);
}
#else
constexpr int64_t kCodes = 32;

template <typename T>
inline void look_up_codes(const Table<T>& table, const uint8_t* codes, T* to) {
  look_up(table, codes, kCodes, to);
}
#endif

// `columns` values with a scale for each `group` of them. scale(i) is the i-th as a float.
template <typename T, typename Scale>
inline void decode_groups(const float* values, const uint8_t* codes, int64_t columns, int64_t group,
                          Scale scale, T* to) {
  for (int64_t first = 0; first < columns; first += group) {
    const Table<T> table(values, scale(first / group));
    const int64_t end = first + group < columns ? first + group : columns;
    int64_t i = first;
    for (; i + kCodes <= end; i += kCodes) look_up_codes(table, codes + i / 2, to + i);
    look_up(table, codes + i / 2, end - i, to + i);
  }
}

template <typename T>
inline void decode_int4(const dgemma_quantized& matrix, int64_t row, int64_t columns, T* to) {
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.values) + row * (columns / 2);
  const int64_t group = matrix.group;
  const uint16_t* scales =
      static_cast<const uint16_t*>(matrix.scales) + row * ((columns + group - 1) / group);
  if (matrix.scale_dtype == DGEMMA_BFLOAT16)
    decode_groups(
        kInt4Values, codes, columns, group,
        [scales](int64_t i) { return to_float(bfloat16{scales[i]}); }, to);
  else
    decode_groups(
        kInt4Values, codes, columns, group,
        [scales](int64_t i) { return half_to_float(scales[i]); }, to);
}

// Columns that share a scale of the format NVFP4.
constexpr int64_t kNvfp4Group = 16;

template <typename T>
inline void decode_nvfp4(const dgemma_quantized& matrix, int64_t row, int64_t columns, T* to) {
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.values) + row * (columns / 2);
  const uint8_t* scales =
      static_cast<const uint8_t*>(matrix.scales) + row * (columns / kNvfp4Group);
  for (int64_t i = 0; i < columns; i += kNvfp4Group) {
    const Table<T> table(kE2m1Values, e4m3_to_float(scales[i / kNvfp4Group]));
    look_up(table, codes + i / 2, kNvfp4Group, to + i);
  }
}

#if defined(__AVX512BW__)
// Two groups at a time: the tables of both fill one register of 32 words, and the codes of the
// second group look into its upper half.
template <>
inline void decode_nvfp4<bfloat16>(const dgemma_quantized& matrix, int64_t row, int64_t columns,
                                   bfloat16* to) {
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.values) + row * (columns / 2);
  const uint8_t* scales =
      static_cast<const uint8_t*>(matrix.scales) + row * (columns / kNvfp4Group);
  Words32 offset = {};
  for (int i = 16; i < 32; ++i) offset[i] = 16;
  int64_t i = 0;
  for (; i + 2 * kNvfp4Group <= columns; i += 2 * kNvfp4Group) {
    bfloat16 words[32];
    store(words, load(kE2m1Values) * e4m3_to_float(scales[i / kNvfp4Group]));
    store(words + 16, load(kE2m1Values) * e4m3_to_float(scales[i / kNvfp4Group + 1]));
    Words32 tables;
    std::memcpy(&tables, words, sizeof tables);
    const Words32 result = permute(spread_codes(codes + i / 2) | offset, tables);
    std::memcpy(to + i, &result, sizeof result);
  }
  if (i < columns) {
    const Table<bfloat16> table(kE2m1Values, e4m3_to_float(scales[i / kNvfp4Group]));
    look_up(table, codes + i / 2, kNvfp4Group, to + i);
  }
}
#endif

// Values without their row's factor, which the finished sums are multiplied with. All are exact.
template <typename T>
inline void decode_fp8(const dgemma_quantized& matrix, int64_t row, int64_t columns, T* to) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.values) + row * columns;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    Bytes bytes;
    std::memcpy(&bytes, codes + i, sizeof bytes);
    const Words code = __builtin_convertvector(bytes, Words);
    const Floats normal = (Floats)(((code & 0x7fu) << 20) + (120u << 23));
    const Floats small = __builtin_convertvector(code & 7u, Floats) * 0x1p-9f;
    const Floats magnitude = (code & 0x78u) == 0u ? small : normal;
    store(to + i, (Floats)((Words)magnitude | (code & 0x80u) << 24));
  }
  for (; i < columns; ++i) to[i] = round_to<T>(e4m3_to_float(codes[i]));
}

#if defined(__AVX512BW__)
template <>
inline void decode_fp8<bfloat16>(const dgemma_quantized& matrix, int64_t row, int64_t columns,
                                 bfloat16* to) {
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.values) + row * columns;
  // The eight numbers without an exponent, m / 512.
  Words32 small = {};
  for (int m = 1; m < 8; ++m)
    small[m] = round_to<bfloat16>(e4m3_to_float(static_cast<uint8_t>(m))).bits;
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    Bytes32 bytes;
    std::memcpy(&bytes, codes + i, sizeof bytes);
    const Words32 code = __builtin_convertvector(bytes, Words32);
    const Words32 normal = ((code & 0x7f) << 4) + (120 << 7);
    const Words32 magnitude = (code & 0x78) == 0 ? permute(code, small) : normal;
    const Words32 result = magnitude | ((code & 0x80) << 8);
    std::memcpy(to + i, &result, sizeof result);
  }
  for (; i < columns; ++i) to[i] = round_to<bfloat16>(e4m3_to_float(codes[i]));
}
#endif

template <typename T>
inline void decode_row(const dgemma_quantized& matrix, int64_t row, int64_t columns, T* to) {
  switch (matrix.format) {
    case DGEMMA_WEIGHTS_FP8:
      return decode_fp8(matrix, row, columns, to);
    case DGEMMA_WEIGHTS_INT4:
      return decode_int4(matrix, row, columns, to);
    case DGEMMA_WEIGHTS_NVFP4:
      return decode_nvfp4(matrix, row, columns, to);
  }
}

}  // namespace
}  // namespace dgemma
