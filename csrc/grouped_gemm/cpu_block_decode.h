// Blocks of 16 weight rows by 32 columns, from codes of 4 or 8 bits to sixteen registers. A
// register holds two columns of all 16 rows, a row in each of its 32-bit lanes: times two values of
// a token, broadcast, it adds to 16 sums, none of which is ever folded. AVX-512 alone.
//
// Registers of four rows come first: rows q, q + 4, q + 8 and q + 12 in their four 128-bit parts,
// where a byte permutation has a table for each part. Four such registers are transposed.
#pragma once

#include "grouped_gemm/cpu_decode.h"
#include "grouped_gemm/quantized.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlockColumns = 32;
constexpr int kBlockRegisters = 16;

// Where column i of a block lies in the order of its registers, two to a register: even columns
// first, since the halves of a byte are told apart for a whole register at a time.
constexpr int block_place(int i) { return (i & 1) * 16 + (i >> 1); }

// Below, the forms of instructions that take a mask, as in cpu_decode.h.
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint64_t Quads __attribute__((vector_size(64)));

template <typename Vector, typename T>
inline Vector load_as(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// In each 128-bit part: table[index], or 0 where the index is 0x80.
inline Bytes look_up(Bytes table, Bytes index) {
  return (Bytes)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)table, (__m512i)index);
}
// In each 128-bit part: words of the low (high) eight bytes of both.
inline Words interleave_low(Bytes low, Bytes high) {
  return (Words)_mm512_maskz_unpacklo_epi8(~0ull, (__m512i)low, (__m512i)high);
}
inline Words interleave_high(Bytes low, Bytes high) {
  return (Words)_mm512_maskz_unpackhi_epi8(~0ull, (__m512i)low, (__m512i)high);
}
inline Bytes low_halves(Bytes codes) { return codes & (Bytes{} + 15); }
inline Bytes high_halves(Bytes codes) { return low_halves((Bytes)((Words32)codes >> 4)); }

// Sixteen bytes of each of four rows, `stride` bytes apart.
inline Bytes join_rows(const __m128i (&row)[4]) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row[0]), row[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row[2]), row[3], 1);
  return (Bytes)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
}
inline Bytes load_rows(const uint8_t* from, int64_t stride) {
  __m128i row[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], from + r * stride, sizeof row[r]);
  return join_rows(row);
}
// The first `count` bytes of each, and zeros.
inline Bytes load_rows_partial(const uint8_t* from, int64_t stride, int64_t count) {
  const __mmask16 wanted = static_cast<__mmask16>((1 << count) - 1);
  __m128i row[4];
  for (int r = 0; r < 4; ++r) row[r] = _mm_maskz_loadu_epi8(wanted, from + r * stride);
  return join_rows(row);
}

// In each 128-bit part of four registers: their 32-bit lanes transposed, in two steps.
struct HalfTransposed {
  Quads low01, high01, low23, high23;
};
inline HalfTransposed begin_transpose(const Words (&from)[4]) {
  const auto low = [](Words x, Words y) __attribute__((always_inline)) {
    return (Quads)__builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                                          13, 29);
  };
  const auto high = [](Words x, Words y) __attribute__((always_inline)) {
    return (Quads)__builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30,
                                          15, 31);
  };
  return {low(from[0], from[1]), high(from[0], from[1]), low(from[2], from[3]),
          high(from[2], from[3])};
}
inline void end_transpose(const HalfTransposed& half, Words* to) {
  const auto low = [](Quads x, Quads y) __attribute__((always_inline)) {
    return (Words)__builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14);
  };
  const auto high = [](Quads x, Quads y) __attribute__((always_inline)) {
    return (Words)__builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  };
  to[0] = low(half.low01, half.low23);
  to[1] = high(half.low01, half.low23);
  to[2] = low(half.high01, half.high23);
  to[3] = high(half.high01, half.high23);
}

// The 16 codes of 4 bits: eight magnitudes and zero. The magnitudes come from two registers, four
// from each; by code, which of the eight (-1: zero) and whether it is negative. kExact: bfloat16
// holds every magnitude times a scale, so that nothing is rounded.
struct Int4Codes {
  static constexpr bool kExact = false;
  static constexpr float kFirst[4] = {1, 2, 4, 8}, kSecond[4] = {3, 5, 6, 7};
  static constexpr int magnitude(int code) {
    constexpr int kIndex[9] = {-1, 0, 1, 4, 2, 5, 6, 7, 3};
    return kIndex[code < 8 ? 8 - code : code - 8];
  }
  static constexpr bool negative(int code) { return code < 8; }
};
struct E2m1Codes {
  static constexpr bool kExact = true;
  static constexpr float kFirst[4] = {0.5f, 1, 2, 4}, kSecond[4] = {1.5f, 3, 6, 0};
  static constexpr int magnitude(int code) {
    constexpr int kIndex[8] = {-1, 0, 1, 4, 2, 5, 3, 6};
    return kIndex[code & 7];
  }
  static constexpr bool negative(int code) { return code >= 8; }
};
template <typename Codes>
struct CodeTables {
  alignas(64) uint8_t low[64], high[64], signs[64];  // bytes of the magnitudes' words, by code
  alignas(64) float first[16], second[16];
  alignas(64) uint16_t upper_words[32];  // of both, four of each to a 128-bit part
  constexpr CodeTables() : low(), high(), signs(), first(), second(), upper_words() {
    for (int i = 0; i < 64; ++i) {
      const int word = Codes::magnitude(i % 16);
      low[i] = word < 0 ? 0x80 : static_cast<uint8_t>(2 * word);
      high[i] = word < 0 ? 0x80 : static_cast<uint8_t>(2 * word + 1);
      signs[i] = Codes::negative(i % 16) ? 0x80 : 0;
    }
    for (int i = 0; i < 16; ++i) {
      first[i] = Codes::kFirst[i % 4];
      second[i] = Codes::kSecond[i % 4];
    }
    for (int i = 0; i < 32; ++i)
      upper_words[i] = static_cast<uint16_t>(i % 8 / 4 * 32 + i / 8 * 8 + i % 4 * 2 + 1);
  }
};
template <typename Codes>
constexpr CodeTables<Codes> kCodeTables;

// The magnitudes of codes in bfloat16 under the scales of four rows, each in four lanes: eight
// words to each 128-bit part.
template <typename Codes>
inline Bytes make_magnitudes(Floats scales) {
  const CodeTables<Codes>& codes = kCodeTables<Codes>;
  const Floats first = load(codes.first) * scales, second = load(codes.second) * scales;
  if constexpr (Codes::kExact)
    return (Bytes)_mm512_maskz_permutex2var_epi16(
        ~0u, (__m512i)first, (__m512i)load_as<Words32>(codes.upper_words), (__m512i)second);
  // A row's first four words lie in the lower half, its second four in the upper.
  const Quads rounded = (Quads)round_pair(first, second);
  return (Bytes)__builtin_shufflevector(rounded, rounded, 0, 4, 1, 5, 2, 6, 3, 7);
}

// bfloat16 values of four rows, sixteen of each in a 128-bit part: their low and their high bytes.
struct FourRows {
  Bytes low, high;
};
template <typename Codes>
inline FourRows look_up_codes(Bytes magnitudes, Bytes index) {
  const CodeTables<Codes>& codes = kCodeTables<Codes>;
  const Bytes low = look_up(magnitudes, load_as<Bytes>(codes.low));
  const Bytes high = look_up(magnitudes, load_as<Bytes>(codes.high)) ^ load_as<Bytes>(codes.signs);
  return {look_up(low, index), look_up(high, index)};
}

// e4m3 to bfloat16, the low and the high bytes. The lower half of a code becomes the upper half of
// the low byte, the upper half stands for sign and exponent; but eight numbers without an exponent,
// m / 512, have tables of their own. 60 is half the difference of the exponents' biases.
struct E4m3Tables {
  alignas(64) uint8_t high[64], small_low[64], small_high[64];
  constexpr E4m3Tables() : high(), small_low(), small_high() {
    constexpr uint16_t kSmall[8] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    for (int i = 0; i < 64; ++i) {
      const int half = i % 16;
      high[i] = static_cast<uint8_t>((half & 8) << 4 | (60 + (half & 7)));
      small_low[i] = static_cast<uint8_t>(kSmall[half & 7]);
      small_high[i] = static_cast<uint8_t>((kSmall[half & 7] >> 8) - 60);  // added to the above
    }
  }
};
constexpr E4m3Tables kE4m3Tables;
inline FourRows e4m3_bytes(Bytes codes) {
  const Bytes low = low_halves(codes), high = high_halves(codes);
  const __mmask64 is_small =
      _mm512_testn_epi8_mask((__m512i)codes, (__m512i)(Bytes{} + uint8_t{0x78}));
  const Bytes moved = (Bytes)((Words32)low << 4);
  const Bytes usual = look_up(load_as<Bytes>(kE4m3Tables.high), high);
  return {
      (Bytes)_mm512_mask_shuffle_epi8((__m512i)moved, is_small,
                                      (__m512i)load_as<Bytes>(kE4m3Tables.small_low), (__m512i)low),
      usual + (Bytes)_mm512_maskz_shuffle_epi8(
                  is_small, (__m512i)load_as<Bytes>(kE4m3Tables.small_high), (__m512i)low)};
}

// Scales of rows q, q + 4, q + 8 and q + 12 as floats, cut in two: eight words of each to a 128-bit
// part. What bfloat16 and e4m3 hold lies in the upper halves.
struct ScaleWords {
  Words32 upper, lower;
};
inline ScaleWords cut_halves(Bytes float16) {
  __m256i halves[2];
  std::memcpy(halves, &float16, sizeof halves);
  const Words low = (Words)_mm512_maskz_cvtph_ps(0xffff, halves[0]);
  const Words high = (Words)_mm512_maskz_cvtph_ps(0xffff, halves[1]);
  const auto low_words = [](Words a, Words b) __attribute__((always_inline)) {
    const Halves words[2] = {__builtin_convertvector(a, Halves),
                             __builtin_convertvector(b, Halves)};
    return load_as<Words32>(words);
  };
  return {low_words(low >> 16, high >> 16), low_words(low, high)};
}
constexpr int64_t kScalesPerWords = 8;

// to[4 * i + q]: scales 8 i to 8 i + 7 of the rows from q. A row's scales take `row_bytes` bytes.
template <dgemma_weight_format kFormat>
constexpr int64_t arranged_scales(int64_t row_bytes) {
  return (row_bytes + 15) / 16 * 4 * (16 / kScaleBytes<kFormat> / kScalesPerWords);
}
template <dgemma_weight_format kFormat>
inline void arrange_scales(const uint8_t* from, int64_t row_bytes, dgemma_dtype dtype,
                           ScaleWords* to) {
  constexpr Words32 kNothing = {};
  for (int64_t first = 0; first < row_bytes; first += 16) {
    const int64_t left = row_bytes - first;
    for (int q = 0; q < 4; ++q) {
      const Bytes stored =
          load_rows_partial(from + q * row_bytes + first, 4 * row_bytes, left < 16 ? left : 16);
      if constexpr (kFormat == DGEMMA_WEIGHTS_NVFP4) {
        const FourRows bytes = e4m3_bytes(stored);
        to[q] = {(Words32)interleave_low(bytes.low, bytes.high), kNothing};
        to[4 + q] = {(Words32)interleave_high(bytes.low, bytes.high), kNothing};
      } else if (dtype == DGEMMA_BFLOAT16) {
        to[q] = {(Words32)stored, kNothing};
      } else {
        to[q] = cut_halves(stored);
      }
    }
    to += arranged_scales<kFormat>(16);
  }
}

// Scale number `which` of four rows as floats, each in four lanes.
struct SpreadScale {
  alignas(64) uint16_t words[kScalesPerWords][32];  // of both registers
  alignas(64) uint8_t bytes[kScalesPerWords][64];   // of the upper one
  constexpr SpreadScale() : words(), bytes() {
    for (int which = 0; which < kScalesPerWords; ++which) {
      for (int i = 0; i < 32; ++i)
        words[which][i] = static_cast<uint16_t>((i % 2 == 0 ? 32 : 0) + i / 8 * 8 + which);
      for (int i = 0; i < 64; ++i)
        bytes[which][i] = i % 4 < 2 ? 0x80 : static_cast<uint8_t>(2 * which + i % 2);
    }
  }
};
constexpr SpreadScale kSpreadScale;
template <bool kUpperAlone>
inline Floats spread_scale(const ScaleWords& scales, int64_t which) {
  if constexpr (kUpperAlone)
    return (Floats)look_up((Bytes)scales.upper, load_as<Bytes>(kSpreadScale.bytes[which]));
  return (Floats)_mm512_maskz_permutex2var_epi16(
      ~0u, (__m512i)scales.upper, (__m512i)load_as<Words32>(kSpreadScale.words[which]),
      (__m512i)scales.lower);
}

// Sixteen rows of a quantized matrix, a block at a time, each in as many parts as it has registers,
// to stand between the products of the block before.
template <dgemma_weight_format kFormat>
class BlockDecoder {
 public:
  static constexpr int64_t kRunBytes = kFormat == DGEMMA_WEIGHTS_FP8 ? 32 : 16;  // of a row

  // `row` of the matrix is the first; `scales` as arrange_scales leaves them.
  BlockDecoder(const dgemma_quantized& matrix, int64_t row, int64_t columns,
               const ScaleWords* scales)
      : row_bytes_(columns / kBlockColumns * kRunBytes),
        halves_{codes_of(matrix, row),
                codes_of(matrix, row) + (kFormat == DGEMMA_WEIGHTS_FP8 ? 16 : 0)},
        scales_(scales),
        group_shift_(matrix.group == 128  ? 2
                     : matrix.group == 64 ? 1
                                          : 0) {}

  // What is to be done before the first part of the first block.
  __attribute__((always_inline)) void begin(int64_t block) {
    for (int q = 0; q < 4; ++q) make_table(block, 0, q);
  }
  // A half of a block takes eight parts: four times the look-up of rows q, q + 4, q + 8 and q + 12,
  // and twice the registers that low or high bytes make, in two. Tables are made for the next half;
  // `following` is the block after this one.
  __attribute__((always_inline)) void make(int part, int64_t block, int64_t following, Words* to) {
    const int half = part / 8, step = part % 8;
    if (step < 4) {
      bytes_[step] = look_up_rows(block, half, step);
      return;
    }
    if (half == 0)
      make_table(block, 1, step - 4);
    else
      make_table(following, 0, step - 4);
    const bool high = step >= 6;
    if (step % 2 == 0) {
      Words rows[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
        rows[q] = high ? interleave_high(bytes_[q].low, bytes_[q].high)
                       : interleave_low(bytes_[q].low, bytes_[q].high);
      half_transposed_ = begin_transpose(rows);
    } else {
      // INT4's halves are those of its bytes, even and odd columns; the others' are 16 columns.
      const int quarter = kFormat == DGEMMA_WEIGHTS_INT4 ? 2 * half + high : half + 2 * high;
      end_transpose(half_transposed_, to + 4 * quarter);
    }
  }

 private:
  const uint8_t* codes_of(const dgemma_quantized& matrix, int64_t row) const {
    return static_cast<const uint8_t*>(matrix.values) + row * row_bytes_;
  }
  // Of rows q, q + 4, ...: eight columns in the lower and eight in the upper half of each part.
  __attribute__((always_inline)) FourRows look_up_rows(int64_t block, int half, int q) const {
    const uint8_t* from = halves_[half] + q * row_bytes_ + block * kRunBytes;
    if constexpr (kFormat == DGEMMA_WEIGHTS_FP8) {
      return e4m3_bytes(even_then_odd(load_rows(from, 4 * row_bytes_)));
    } else if constexpr (kFormat == DGEMMA_WEIGHTS_NVFP4) {
      const Bytes codes = load_rows(from, 4 * row_bytes_);
      return look_up_codes<E2m1Codes>(magnitudes_[q], halves_of_eight(codes, half));
    } else {
      const Bytes codes = load_rows(from, 4 * row_bytes_);
      return look_up_codes<Int4Codes>(magnitudes_[q],
                                      half == 0 ? low_halves(codes) : high_halves(codes));
    }
  }
  // In each part: bytes 0, 2, 4, ... and then 1, 3, 5, ...
  static Bytes even_then_odd(Bytes bytes) {
    constexpr Quads kOrder = {0x0e0c0a0806040200, 0x0f0d0b0907050301, 0x0e0c0a0806040200,
                              0x0f0d0b0907050301, 0x0e0c0a0806040200, 0x0f0d0b0907050301,
                              0x0e0c0a0806040200, 0x0f0d0b0907050301};
    return look_up(bytes, (Bytes)kOrder);
  }
  // In each part: the low halves of its first (second) eight bytes, then the high ones.
  static Bytes halves_of_eight(Bytes codes, int which) {
    const Quads eights = (Quads)codes;
    const Quads twice = which == 0
                            ? __builtin_shufflevector(eights, eights, 0, 0, 2, 2, 4, 4, 6, 6)
                            : __builtin_shufflevector(eights, eights, 1, 1, 3, 3, 5, 5, 7, 7);
    constexpr Quads kShift = {0, 4, 0, 4, 0, 4, 0, 4};
    return low_halves((Bytes)(twice >> kShift));
  }
  __attribute__((always_inline)) void make_table(int64_t block, int half, int q) {
    if (kFormat == DGEMMA_WEIGHTS_INT4 && half == 0)
      magnitudes_[q] = make_magnitudes<Int4Codes>(scales(block >> group_shift_, q));
    if (kFormat == DGEMMA_WEIGHTS_NVFP4)
      magnitudes_[q] = make_magnitudes<E2m1Codes>(scales(2 * block + half, q));
  }
  Floats scales(int64_t group, int q) const {
    return spread_scale<kFormat == DGEMMA_WEIGHTS_NVFP4>(scales_[group / kScalesPerWords * 4 + q],
                                                         group % kScalesPerWords);
  }

  const int64_t row_bytes_;
  // Codes of a block's halves in row 0. Of 4-bit codes both lie in the same bytes, but as one
  // pointer these would be held between the halves, in four registers that the sums need.
  const uint8_t* const halves_[2];
  const ScaleWords* const scales_;
  const int group_shift_;  // blocks that share a scale of INT4: 1 << group_shift_
  Bytes magnitudes_[4];
  FourRows bytes_[4];
  HalfTransposed half_transposed_;
};

}  // namespace
}  // namespace dgemma
#endif
