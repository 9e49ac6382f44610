// 4-bit weights as A of wgmma, decoded in the order of permuted_k.h: a word's eight values are the
// four of two steps.
//
// As in quantized_decode.h every value comes out exactly and times its scale is rounded once, to
// the same bits; only the power of two that is left for the sum differs. A value is made a whole
// number in the low byte of each half, which bfloat16 reads as so many times 2^-133: that is linear
// up to 255, since the first normal numbers lie as close as the subnormal ones. The number of
// integer instructions matters here: they run at half the rate of multiply-adds.
#pragma once

#include "grouped_gemm/cuda/quantized_decode.h"

namespace dgemma::moe_sm90_quantized {

using device::permute_bytes;

constexpr float sum_unit_sm90(Encoding encoding) {
  switch (encoding) {
    case Encoding::kInt4:
      return 0x1p33f;
    case Encoding::kInt4Float16:
      return 64.0f;
    case Encoding::kNvfp4:
      return 65536.0f;
    case Encoding::kFp8:
    case Encoding::kFp8Activations:
    case Encoding::kInt8:
      break;  // no weights of 8 bits are decoded here
  }
  return 0.0f;
}
// Sums of weights decoded here are to be multiplied by this.
template <Encoding kEncoding>
constexpr float kSumUnit = sum_unit_sm90(kEncoding);

// One group's scale for one row, ready for use: each value in both halves.
template <Encoding kEncoding>
struct GroupScale;

// (q + 8) 2^-133 times `even`, or 16 (q + 8) 2^-133 times `odd`, and `eight` added: q scale 2^-33,
// rounded once. A scale of 2^28 or more would become infinite and its weights no number; below
// 2^-93 products lose bits.
template <>
struct GroupScale<Encoding::kInt4> {
  uint32_t even, odd, eight;
};
template <>
struct GroupScale<Encoding::kInt4Float16> {
  uint32_t high, low;  // bfloat16 and the rest that it leaves of the scale
};
template <>
struct GroupScale<Encoding::kNvfp4> {
  uint32_t scale;  // by 2^116
};

// Groups among the 32 columns of a stage that a thread has.
template <Encoding kEncoding>
constexpr int kGroups = kEncoding == Encoding::kNvfp4 ? 2 : 1;

// Decodes the 16 bits of each of two rows: a scale, or two of NVFP4.
template <Encoding kEncoding>
DGEMMA_DEVICE void decode_scales(uint32_t first, uint32_t second,
                                 GroupScale<kEncoding> (&to)[2][kGroups<kEncoding>]) {
  using namespace decode;
  const uint32_t both = first | second << 16;
  if constexpr (kEncoding == Encoding::kInt4) {
    const uint32_t even = multiply(both, kTwicePower<100>);
    const uint32_t odd = multiply(both, kTwicePower<96>);
    const uint32_t eight = multiply(both, kTwicePower<-30> | 0x80008000u);
    to[0][0] = {low_twice(even), low_twice(odd), low_twice(eight)};
    to[1][0] = {high_twice(even), high_twice(odd), high_twice(eight)};
  } else if constexpr (kEncoding == Encoding::kInt4Float16) {
    Scale<kEncoding> scale[2];
    dgemma::decode_scales<kEncoding>(first, second, scale);
    for (int row = 0; row < 2; ++row) to[row][0] = {scale[row].high, scale[row].low};
  } else {
    static_assert(kEncoding == Encoding::kNvfp4);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint32_t small =
          multiply(e4m3_by_power(group == 0 ? both << 8 : both), kTwicePower<118>);
      const uint32_t pair = multiply(small, kTwicePower<118>);
      to[0][group].scale = low_twice(pair);
      to[1][group].scale = high_twice(pair);
    }
  }
}

// Twice the magnitudes of e2m1 by their codes, a byte each. Half of them come from lane 0, which
// keeps them in a register: the compiler would make the constant anew wherever it is used.
struct DecodeTable {
  uint32_t first;
  static constexpr uint32_t kLast = 0x0c080604;
};
DGEMMA_DEVICE DecodeTable make_decode_table() {
  return {__shfl_sync(device::kAllLanes, 0x03020100u + device::lane_index(), 0)};
}

// pair[0], pair[1]: the values at even places, as a step takes them; pair[2], pair[3]: at odd ones.
template <Encoding kEncoding>
DGEMMA_DEVICE void decode_word(uint32_t word, const GroupScale<kEncoding>& scale,
                               const DecodeTable& table, uint32_t (&pair)[4]) {
  using decode::multiply;
  using device::multiply_add_bfloat16;
  if constexpr (kEncoding == Encoding::kNvfp4) {
    const uint32_t codes = word & 0x77777777u;
    const uint32_t low = permute_bytes(table.first, table.kLast, codes);
    const uint32_t high = permute_bytes(table.first, table.kLast, codes >> 16);
    const uint32_t even = word << 4 & 0x80808080u, odd = word & 0x80808080u;  // signs
    pair[0] = permute_bytes(low, even, 0x5240);
    pair[1] = permute_bytes(high, even, 0x7260);
    pair[2] = permute_bytes(low, odd, 0x5341);
    pair[3] = permute_bytes(high, odd, 0x7361);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = multiply(pair[i], scale.scale);
  } else {
    static_assert(kFormat<kEncoding> == DGEMMA_WEIGHTS_INT4);
    const uint32_t even = word & 0x0f0f0f0fu, odd = word & 0xf0f0f0f0u;  // 16 times
    pair[0] = permute_bytes(even, 0, 0x4140);
    pair[1] = permute_bytes(even, 0, 0x4342);
    pair[2] = permute_bytes(odd, 0, 0x4140);
    pair[3] = permute_bytes(odd, 0, 0x4342);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kEncoding == Encoding::kInt4) {
        pair[i] = multiply_add_bfloat16(pair[i], i < 2 ? scale.even : scale.odd, scale.eight);
      } else {
        constexpr uint32_t kEight = 0xbe00be00;  // -8 / 64
        const uint32_t power = i < 2 ? decode::kTwicePower<127> : decode::kTwicePower<123>;
        const uint32_t value = multiply_add_bfloat16(pair[i], power, kEight);
        // q times the rest has seven bits, so only the sum is rounded.
        pair[i] = multiply_add_bfloat16(value, scale.high, multiply(value, scale.low));
      }
    }
  }
}

}  // namespace dgemma::moe_sm90_quantized
