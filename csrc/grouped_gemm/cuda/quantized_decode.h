// Quantized weights and their scales as pairs of bfloat16: what the tensor cores multiply.
//
// A pair's halves are two columns that follow each other, the lower one low, so that activations
// meet them in the order in which they lie. Every value comes out exactly; times its scale it is
// rounded once (INT4) or not at all (NVFP4: one bit of fraction by three). The row scale (the C
// interface's factor) is applied to the sum, and so is the power of two kUnit, which keeps the
// exponents of the steps below within those of bfloat16.
#pragma once

#include "device/bfloat16.h"
#include "device/bytes.h"
#include "device/language.h"
#include "grouped_gemm/weight_format.h"

namespace dgemma {

// A weight format as the kernels see it: INT4 by the type of its scales. With kFp8Activations and
// kInt8 the tokens are bytes of the same format and nothing is decoded.
enum class Encoding { kFp8, kInt4, kInt4Float16, kNvfp4, kFp8Activations, kInt8 };

constexpr dgemma_weight_format format_of(Encoding encoding) {
  switch (encoding) {
    case Encoding::kFp8:
    case Encoding::kFp8Activations:
      return DGEMMA_WEIGHTS_FP8;
    case Encoding::kInt4:
    case Encoding::kInt4Float16:
      return DGEMMA_WEIGHTS_INT4;
    case Encoding::kNvfp4:
      return DGEMMA_WEIGHTS_NVFP4;
    case Encoding::kInt8:
      return DGEMMA_WEIGHTS_INT8;
  }
  return {};
}
template <Encoding kEncoding>
constexpr dgemma_weight_format kFormat = format_of(kEncoding);
// Bytes of a group's scale.
template <Encoding kEncoding>
constexpr int32_t kScaleBytes = describe(kFormat<kEncoding>).scale_bytes;
template <Encoding kEncoding>
constexpr bool kHasScales = kScaleBytes<kEncoding> > 0;

constexpr float sum_unit(Encoding encoding) {
  switch (encoding) {
    case Encoding::kFp8:
    case Encoding::kFp8Activations:
    case Encoding::kInt8:
      return 1.0f;
    case Encoding::kInt4:
    case Encoding::kInt4Float16:
      return 64.0f;
    case Encoding::kNvfp4:
      return 1024.0f;
  }
  return 0.0f;
}
// Sums of decoded weights are to be multiplied by this.
template <Encoding kEncoding>
constexpr float kUnit = sum_unit(kEncoding);

namespace decode {

using device::multiply_add_bfloat16;
using device::permute_bytes;

// A register whose two halves are this power of two.
template <int kExponent>
constexpr uint32_t kTwicePower = static_cast<uint32_t>(kExponent + 127) * 0x00800080u;
// Added to a product: x + -0 is x, of either zero too.
constexpr uint32_t kNegativeZeros = 0x80008000;

DGEMMA_DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
  return multiply_add_bfloat16(a, b, kNegativeZeros);
}
DGEMMA_DEVICE uint32_t low_twice(uint32_t pair) { return permute_bytes(pair, 0, 0x1010); }
DGEMMA_DEVICE uint32_t high_twice(uint32_t pair) { return permute_bytes(pair, 0, 0x3232); }

// e4m3 in the upper byte of each half, anything in the lower: the values by 2^-120. The exponent's
// four bits become the low ones of bfloat16's, whose bias is 120 more; subnormals stay subnormal.
DGEMMA_DEVICE uint32_t e4m3_by_power(uint32_t bytes) {
  return (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> 4;
}

// Four values of FP8.
DGEMMA_DEVICE void fp8(uint32_t word, uint32_t (&pair)[2]) {
  pair[0] = multiply(e4m3_by_power(permute_bytes(word, 0, 0x1100)), kTwicePower<120>);
  pair[1] = multiply(e4m3_by_power(permute_bytes(word, 0, 0x3322)), kTwicePower<120>);
}

// Eight values q + 8 of INT4, without a scale: q / 64. A nibble that is all there is in a half is a
// subnormal number, (q + 8) * 2^-133: one multiply-add shifts it to its place and takes the 8 away.
DGEMMA_DEVICE void int4(uint32_t word, uint32_t (&pair)[4]) {
  constexpr uint32_t kEight = 0xbe00be00;  // -8 / 64
  // The bytes of the even columns and of the odd ones; their sign bits, all zero, fill the pairs.
  const uint32_t even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
  constexpr uint32_t kSelectors[4] = {0xc480, 0xd591, 0xe6a2, 0xf7b3};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pair[i] =
        multiply_add_bfloat16(permute_bytes(even, odd, kSelectors[i]), kTwicePower<127>, kEight);
}

// Eight values of NVFP4 by 2^-126: the exponent's two bits become the low ones of bfloat16's, and
// the one value that is subnormal stays so.
DGEMMA_DEVICE void e2m1_by_power(uint32_t word, uint32_t (&pair)[4]) {
  const uint32_t even = word << 4;  // their nibbles where those of the odd columns are
  constexpr uint32_t kSelectors[4] = {0x0044, 0x1155, 0x2266, 0x3377};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibbles = permute_bytes(word, even, kSelectors[i]);
    pair[i] = (nibbles & 0x80008000u) | (nibbles & 0x70007000u) >> 6;
  }
}

// float16 as float, by its exponent's bits: subnormals come out right.
DGEMMA_DEVICE float float16_to_float(uint32_t bits) {
  const float magnitude = __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
  return __uint_as_float(__float_as_uint(magnitude) | (bits & 0x8000u) << 16);
}

}  // namespace decode

// The scale of a thread's values in one row, ready for use: in both halves.
template <Encoding kEncoding>
struct Scale {
  uint32_t high;  // FP8: not used; NVFP4: by 2^116, which takes back all of 2^-126 but kUnit
  uint32_t low;   // INT4 with float16 scales: the rest that bfloat16 leaves of them
};

// The scales of two rows, from the bits of each.
template <Encoding kEncoding>
DGEMMA_DEVICE void decode_scales(uint32_t first, uint32_t second, Scale<kEncoding> (&scale)[2]) {
  if constexpr (kEncoding == Encoding::kNvfp4) {
    // 2^-120 to 2^116: more than one factor holds.
    const uint32_t both = decode::multiply(decode::e4m3_by_power(first << 8 | second << 24),
                                           decode::kTwicePower<118>);
    const uint32_t pair = decode::multiply(both, decode::kTwicePower<118>);
    scale[0].high = decode::low_twice(pair);
    scale[1].high = decode::high_twice(pair);
  } else if constexpr (kEncoding == Encoding::kInt4) {
    scale[0].high = decode::low_twice(first);
    scale[1].high = decode::low_twice(second);
  } else if constexpr (kEncoding == Encoding::kInt4Float16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = decode::float16_to_float(i == 0 ? first : second);
      scale[i].high = device::pack_bfloat16(value, value);
      const float rest = value - device::low_to_float(scale[i].high);
      scale[i].low = device::pack_bfloat16(rest, rest);
    }
  } else {
    static_assert(kScaleBytes<kEncoding> == 0);
  }
}

// Eight columns of a row: one word of 4-bit values, two of FP8 (`word` and `next`).
template <Encoding kEncoding>
DGEMMA_DEVICE void decode_weights(uint32_t word, uint32_t next, const Scale<kEncoding>& scale,
                                  uint32_t (&pair)[4]) {
  if constexpr (kEncoding == Encoding::kFp8) {
    uint32_t low[2], high[2];
    decode::fp8(word, low);
    decode::fp8(next, high);
    pair[0] = low[0], pair[1] = low[1], pair[2] = high[0], pair[3] = high[1];
  } else if constexpr (kEncoding == Encoding::kNvfp4) {
    decode::e2m1_by_power(word, pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = decode::multiply(pair[i], scale.high);
  } else {
    static_assert(kFormat<kEncoding> == DGEMMA_WEIGHTS_INT4);
    decode::int4(word, pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // q times the rest has seven bits, so only the sum is rounded.
      const uint32_t rest = kEncoding == Encoding::kInt4Float16
                                ? decode::multiply(pair[i], scale.low)
                                : decode::kNegativeZeros;
      pair[i] = device::multiply_add_bfloat16(pair[i], scale.high, rest);
    }
  }
}

}  // namespace dgemma
