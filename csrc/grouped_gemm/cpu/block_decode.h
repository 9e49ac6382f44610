// Blocks of 8 weight rows by 32 columns, from codes of 4 or 8 bits to eight registers. A register
// holds four columns, a row in each of its 64-bit lanes: times four values of a token, repeated, it
// adds to 16 sums, two of each row. AVX-512 alone.
//
// Codes are looked up for four rows, in the four 128-bit parts of a register, where a byte
// permutation has a table for each part. Of the 16 rows of a tile, q, q + 4, q + 8 and q + 12 go
// together, so that the tile's sums come out in the order of the rows.
#pragma once

#include "grouped_gemm/cpu/decode.h"
#include "grouped_gemm/cpu/quantized.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockColumns = 32;

// A block is decoded in halves of 16 columns and four registers: of INT4 those are the even and the
// odd columns, since the halves of a byte are told apart for a whole register at a time.
constexpr int kHalfRegisters = 4;

// The place of a block's column i in the order of its registers.
template <dgemma_weight_format kFormat>
constexpr int block_place(int i) {
  switch (kFormat) {
    case DGEMMA_WEIGHTS_FP8:
      return i;
    case DGEMMA_WEIGHTS_INT4:
      return i % 2 * 16 + i / 2;
    case DGEMMA_WEIGHTS_NVFP4:
      return i / 16 * 16 + i % 2 * 8 + i % 16 / 2;
    case DGEMMA_WEIGHTS_INT8:  // not decoded
      break;
  }
  __builtin_unreachable();
}

// The functions below use the masked forms of instructions, as cpu/decode.h does.
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint64_t Quads __attribute__((vector_size(64)));

template <typename Vector, typename T>
inline Vector load_as(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// In each 128-bit part, gives table[index], or 0 where the index is 0x80.
inline Bytes look_up(Bytes table, Bytes index) {
  return (Bytes)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)table, (__m512i)index);
}
// In each 128-bit part, gives words of the low (high) eight bytes of both.
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

// The 16 codes of 4 bits: eight magnitudes times a scale, and zero. Few are computed, the others
// are halves of those, and nothing is multiplied: the products wait for the units that could. By
// magnitude: which of the multiples, and how often it is halved; by code: which magnitude (-1:
// zero), and whether it is negative. E2m1 has seven magnitudes; its last entry stands for nothing.
struct Int4Codes {  // of 16, 24, 40 and 56 times the scale
  static constexpr int kMultiple[8] = {0, 0, 1, 0, 2, 1, 3, 0},
                       kHalved[8] = {4, 3, 3, 2, 3, 2, 3, 1};
  static constexpr int magnitude(int code) { return (code < 8 ? 8 - code : code - 8) - 1; }
  static constexpr bool negative(int code) { return code < 8; }
};
struct E2m1Codes {  // of 4 and 6 times the scale
  static constexpr int kMultiple[8] = {0, 0, 1, 0, 1, 0, 1, 1},
                       kHalved[8] = {3, 2, 2, 1, 1, 0, 0, 0};
  static constexpr int magnitude(int code) { return (code & 7) - 1; }
  static constexpr bool negative(int code) { return code >= 8; }
};
template <typename Codes>
struct CodeTables {
  alignas(64) uint16_t halvings[32];                 // what is taken from the multiples' words
  alignas(64) uint8_t low[64], high[64], signs[64];  // bytes of the magnitudes' words, by code
  constexpr CodeTables() : halvings(), low(), high(), signs() {
    for (int i = 0; i < 32; ++i)
      halvings[i] = static_cast<uint16_t>(Codes::kHalved[i % 8] * 0x80);  // of the exponent
    for (int i = 0; i < 64; ++i) {
      const int word = Codes::magnitude(i % 16);
      low[i] = word < 0 ? 0x80 : static_cast<uint8_t>(2 * word);
      high[i] = word < 0 ? 0x80 : static_cast<uint8_t>(2 * word + 1);
      signs[i] = Codes::negative(i % 16) ? 0x80 : 0;
    }
  }
};
template <typename Codes>
constexpr CodeTables<Codes> kCodeTables;

// The magnitudes of codes in bfloat16 under the scales of four rows, eight words to each 128-bit
// part, from the multiples in their places. Halves of zero are zero: a subtraction that saturates,
// in two instructions that the multiplying units have no part in.
template <typename Codes>
inline Bytes halve_multiples(Words32 multiples) {
  const Words32 halvings = load_as<Words32>(kCodeTables<Codes>.halvings);
  return (Bytes)((multiples > halvings ? multiples : halvings) - halvings);
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
// the low byte, the upper half stands for sign and exponent; what is different of the eight numbers
// without an exponent, m / 512, has tables of its own. 60 is half the difference of the exponents'
// biases. Nothing is compared: the products wait for the units that could.
struct E4m3Tables {
  alignas(64) uint8_t high[64], is_small[64], small_low[64], small_high[64];
  constexpr E4m3Tables() : high(), is_small(), small_low(), small_high() {
    constexpr uint16_t kSmall[8] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    for (int i = 0; i < 64; ++i) {
      const int half = i % 16;
      high[i] = static_cast<uint8_t>((half & 8) << 4 | (60 + (half & 7)));
      is_small[i] = (half & 7) == 0 ? 0xff : 0;
      if (half >= 8) continue;
      small_low[i] = static_cast<uint8_t>(kSmall[half] ^ half << 4);
      small_high[i] = static_cast<uint8_t>((kSmall[half] >> 8) - 60);
    }
  }
};
constexpr E4m3Tables kE4m3Tables;
inline FourRows e4m3_bytes(Bytes codes) {
  const Bytes low = low_halves(codes), high = high_halves(codes);
  const Bytes is_small = look_up(load_as<Bytes>(kE4m3Tables.is_small), high);
  const Bytes small_low = look_up(load_as<Bytes>(kE4m3Tables.small_low), low) & is_small;
  const Bytes small_high = look_up(load_as<Bytes>(kE4m3Tables.small_high), low) & is_small;
  return {(Bytes)((Words32)low << 4) ^ small_low,
          look_up(load_as<Bytes>(kE4m3Tables.high), high) + small_high};
}

// The form in which scales of rows q, q + 4, q + 8 and q + 12 wait for their blocks: eight words of
// each row to a 128-bit part. INT4: 8 times each as floats, cut in two (of bfloat16 the lower
// halves are zeros). NVFP4: 4 and 6 times each in bfloat16, which holds them exactly.
struct ScaleWords {
  Words32 first, second;
};
// A bfloat16, or the upper half of a float, times 2^power; of what has no exponent, and of negative
// zero, zero: halve_multiples wants that.
inline Words32 scale_up(Words32 words, int power) {
  const __mmask32 has_exponent =
      _mm512_test_epi16_mask((__m512i)words, (__m512i)(Words32{} + uint16_t{0x7f80}));
  return (Words32)_mm512_maskz_add_epi16(
      has_exponent, (__m512i)words, (__m512i)(Words32{} + static_cast<uint16_t>(power * 0x80)));
}
inline ScaleWords float16_scales(Bytes float16) {
  __m256i halves[2];
  std::memcpy(halves, &float16, sizeof halves);
  const Words low = (Words)_mm512_maskz_cvtph_ps(0xffff, halves[0]);
  const Words high = (Words)_mm512_maskz_cvtph_ps(0xffff, halves[1]);
  const auto low_words = [](Words a, Words b) __attribute__((always_inline)) {
    const Halves words[2] = {__builtin_convertvector(a, Halves),
                             __builtin_convertvector(b, Halves)};
    return load_as<Words32>(words);
  };
  return {scale_up(low_words(low >> 16, high >> 16), 3), low_words(low, high)};
}
// The difference of 1.5 times a bfloat16 with three bits of mantissa from that bfloat16, by those
// bits: half of the mantissa where the exponent stays, else less and an exponent.
struct HalfMore {
  alignas(64) uint8_t bytes[64];
  constexpr HalfMore() : bytes() {
    for (int i = 0; i < 64; ++i)
      bytes[i] = static_cast<uint8_t>(i % 8 < 3 ? 64 + 8 * (i % 8) : 96 - 4 * (i % 8));
  }
};
constexpr HalfMore kHalfMore;
// Sixteen scales of each row.
inline void e4m3_scales(Bytes e4m3, ScaleWords* low, ScaleWords* high) {
  const FourRows bytes = e4m3_bytes(e4m3);
  const Bytes mantissas = (Bytes)((Words32)bytes.low >> 4) & (Bytes{} + 7);
  const Bytes more = look_up(load_as<Bytes>(kHalfMore.bytes), mantissas);
  const auto multiples = [](Words32 words, Words32 half) __attribute__((always_inline)) {
    return ScaleWords{scale_up(words, 2), scale_up(words + half, 2)};
  };
  *low = multiples((Words32)interleave_low(bytes.low, bytes.high),
                   (Words32)interleave_low(more, Bytes{}));
  *high = multiples((Words32)interleave_high(bytes.low, bytes.high),
                    (Words32)interleave_high(more, Bytes{}));
}
constexpr int64_t kScalesPerWords = 8;

// to[4 * i + q]: scales 8 i to 8 i + 7 of the rows from q. A row's scales take `row_bytes` bytes.
template <dgemma_weight_format kFormat>
constexpr int64_t packed_scales(int64_t row_bytes) {
  return (row_bytes + 15) / 16 * 4 * (16 / kScaleBytes<kFormat> / kScalesPerWords);
}
template <dgemma_weight_format kFormat>
inline void pack_scales(const uint8_t* from, int64_t row_bytes, dgemma_dtype dtype,
                        ScaleWords* to) {
  for (int64_t first = 0; first < row_bytes; first += 16) {
    const int64_t left = row_bytes - first;
    for (int q = 0; q < 4; ++q) {
      const Bytes stored =
          load_rows_partial(from + q * row_bytes + first, 4 * row_bytes, left < 16 ? left : 16);
      if constexpr (kFormat == DGEMMA_WEIGHTS_NVFP4) {
        e4m3_scales(stored, to + q, to + 4 + q);
      } else if (dtype == DGEMMA_BFLOAT16) {
        to[q] = {scale_up((Words32)stored, 3), Words32{}};
      } else {
        to[q] = float16_scales(stored);
      }
    }
    to += packed_scales<kFormat>(16);
  }
}

// The places of the words of scale number `which`, in each 128-bit part: a word of `first` is
// numbered by its place, one of `second` from 32.
struct SpreadScale {
  typedef uint16_t Places[kScalesPerWords][32];
  alignas(64) Places floats;     // INT4: four times
  alignas(64) Places multiples;  // NVFP4: by magnitude
  constexpr SpreadScale() : floats(), multiples() {
    for (int which = 0; which < kScalesPerWords; ++which)
      for (int i = 0; i < 32; ++i) {
        const int word = i / 8 * 8 + which;
        floats[which][i] = static_cast<uint16_t>(word + (i % 2 == 0 ? 32 : 0));
        multiples[which][i] = static_cast<uint16_t>(word + E2m1Codes::kMultiple[i % 8] * 32);
      }
  }
};
constexpr SpreadScale kSpreadScale;
inline Words32 spread_words(const ScaleWords& scales, const uint16_t (&places)[32]) {
  return (Words32)_mm512_maskz_permutex2var_epi16(
      ~0u, (__m512i)scales.first, (__m512i)load_as<Words32>(places), (__m512i)scales.second);
}

// INT4's magnitudes under 8 times the scales of four rows, each in four lanes. A float's multiples
// are sums of it and of a power of two of it: s + s, s + 2 s, s + 4 s, 8 s - s.
struct Int4Multiples {
  alignas(64) uint32_t exponents[16], signs[16];
  alignas(64) uint16_t places[32];  // of the rounded words, by magnitude
  constexpr Int4Multiples() : exponents(), signs(), places() {
    for (int i = 0; i < 16; ++i) {
      exponents[i] = static_cast<uint32_t>(i % 4) << 23;
      signs[i] = i % 4 == 3 ? 0x80000000u : 0;
    }
    for (int i = 0; i < 32; ++i)
      places[i] = static_cast<uint16_t>(i / 8 * 4 + Int4Codes::kMultiple[i % 8]);
  }
};
constexpr Int4Multiples kInt4Multiples;
inline Bytes int4_magnitudes(Words32 words) {
  const Words scales = (Words)words;
  const Floats power = (Floats)(scales + load_as<Words>(kInt4Multiples.exponents));
  const Floats multiples = power + (Floats)(scales ^ load_as<Words>(kInt4Multiples.signs));
  return halve_multiples<Int4Codes>(
      permute(load_as<Words32>(kInt4Multiples.places), round_pair(multiples, multiples)));
}

// Sixteen rows of a quantized matrix, first eight and then the others, a half of a block at a time.
template <dgemma_weight_format kFormat>
class BlockDecoder {
 public:
  static constexpr int64_t kRunBytes = row_bytes(kFormat, kBlockColumns);
  static constexpr int place(int i) { return block_place<kFormat>(i); }

  // `row` of the matrix is the first; `scales` as pack_scales leaves them.
  BlockDecoder(const dgemma_quantized& matrix, int64_t row, int64_t columns,
               const ScaleWords* scales)
      : row_bytes_(columns / kBlockColumns * kRunBytes),
        codes_(static_cast<const uint8_t*>(matrix.values) + row * row_bytes_),
        scales_(scales),
        group_shift_(matrix.group == 128  ? 2
                     : matrix.group == 64 ? 1
                                          : 0) {}

  // Begins eight rows: 0, 1, 4, 5, 8, ... (eight 0) or 2, 3, 6, 7, 10, ... (eight 1).
  __attribute__((always_inline)) void begin(int eight) {
    first_row_ = 2 * eight;
    for (int q = 0; q < 2; ++q) {
      prepare(q, 0, 0);
      look_up_half(q, 0);
      prepare(q, 0, 1);
    }
  }
  // Register i of a half.
  __attribute__((always_inline)) Words take(int half, int i) const {
    const Quads first = (Quads)words_[half][0][i / 2], second = (Quads)words_[half][1][i / 2];
    return i % 2 == 0 ? (Words)__builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14)
                      : (Words)__builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  // Runs after the products of register i of a half. All calls together decode the half that
  // follows and prepare the one after it, in block number `next`.
  __attribute__((always_inline)) void advance(int half, int i, int64_t next) {
    const int q = i / 2;
    if (i % 2 == 0)
      look_up_half(q, 1 - half);
    else
      prepare(q, next, half);
  }

 private:
  // Codes and magnitudes for a half of rows q, q + 4, q + 8 and q + 12, with q from first_row_.
  __attribute__((always_inline)) void prepare(int q, int64_t block, int half) {
    const uint8_t* from = codes_ + (first_row_ + q) * row_bytes_ + block * kRunBytes;
    if constexpr (kFormat == DGEMMA_WEIGHTS_FP8) {
      run_[q] = load_rows(from + 16 * half, 4 * row_bytes_);
      return;
    }
    if (half == 0) run_[q] = load_rows(from, 4 * row_bytes_);
    if (kFormat == DGEMMA_WEIGHTS_INT4 && half == 0)
      magnitudes_[q] = int4_magnitudes(scales(block >> group_shift_, q, kSpreadScale.floats));
    if (kFormat == DGEMMA_WEIGHTS_NVFP4)
      magnitudes_[q] =
          halve_multiples<E2m1Codes>(scales(2 * block + half, q, kSpreadScale.multiples));
  }
  __attribute__((always_inline)) void look_up_half(int q, int half) {
    FourRows bytes;
    if constexpr (kFormat == DGEMMA_WEIGHTS_FP8)
      bytes = e4m3_bytes(run_[q]);
    else if constexpr (kFormat == DGEMMA_WEIGHTS_NVFP4)
      bytes = look_up_codes<E2m1Codes>(magnitudes_[q], halves_of_eight(run_[q], half));
    else if constexpr (kFormat == DGEMMA_WEIGHTS_INT4)
      bytes = look_up_codes<Int4Codes>(magnitudes_[q],
                                       half == 0 ? low_halves(run_[q]) : high_halves(run_[q]));
    else
      static_assert(kFormat == DGEMMA_WEIGHTS_FP8);
    words_[half][q][0] = interleave_low(bytes.low, bytes.high);
    words_[half][q][1] = interleave_high(bytes.low, bytes.high);
  }
  // In each part, gives the low halves of its first (second) eight bytes, then the high ones.
  static Bytes halves_of_eight(Bytes codes, int which) {
    const Quads eights = (Quads)codes;
    const Quads twice = which == 0
                            ? __builtin_shufflevector(eights, eights, 0, 0, 2, 2, 4, 4, 6, 6)
                            : __builtin_shufflevector(eights, eights, 1, 1, 3, 3, 5, 5, 7, 7);
    constexpr Quads kShift = {0, 4, 0, 4, 0, 4, 0, 4};
    return low_halves((Bytes)(twice >> kShift));
  }
  Words32 scales(int64_t group, int q, const SpreadScale::Places& places) const {
    return spread_words(scales_[group / kScalesPerWords * 4 + first_row_ + q],
                        places[group % kScalesPerWords]);
  }

  const int64_t row_bytes_;
  const uint8_t* const codes_;
  const ScaleWords* const scales_;
  const int group_shift_;  // blocks that share a scale of INT4: 1 << group_shift_
  int first_row_;
  // A run of codes of four rows and their magnitudes, for each q. Tables of the magnitudes would
  // take twice the registers, which the sums need.
  Bytes run_[2], magnitudes_[2];
  Words words_[2][2][2];  // of four rows: by half of the block, by q, eight columns to a register
};

}  // namespace
}  // namespace dgemma
#endif
