// The formats that weights are stored in, and what each of them is.
//
// A new format gets a line here. Whatever else a backend does by format is a switch without a
// default, or an `if constexpr` whose last branch asserts its format, so that the compiler names
// every place that does not know the new one (-Wswitch, an error here).
#pragma once

#include <cstdint>

#include "dgemma/grouped_gemm.h"

namespace dgemma {

struct WeightFormat {
  const char* name;
  int32_t bits;                      // of a value
  int32_t scale_bytes;               // of the scale of a group of columns; 0: there are none
  bool scales_are_bfloat16_or_half;  // as scale_dtype says; else they are e4m3
  int32_t least_group,
      most_group;           // columns that share a scale: a power of two from one to the other
  int32_t column_multiple;  // the columns of a matrix are a multiple of this
};

constexpr WeightFormat describe(dgemma_weight_format format) {
  switch (format) {
    case DGEMMA_WEIGHTS_FP8:
      return {.name = "FP8",
              .bits = 8,
              .scale_bytes = 0,
              .scales_are_bfloat16_or_half = false,
              .least_group = 0,
              .most_group = 0,
              .column_multiple = 1};
    case DGEMMA_WEIGHTS_INT4:  // two values to a byte
      return {.name = "INT4",
              .bits = 4,
              .scale_bytes = 2,
              .scales_are_bfloat16_or_half = true,
              .least_group = 32,
              .most_group = 128,
              .column_multiple = 2};
    case DGEMMA_WEIGHTS_NVFP4:
      return {.name = "NVFP4",
              .bits = 4,
              .scale_bytes = 1,
              .scales_are_bfloat16_or_half = false,
              .least_group = 16,
              .most_group = 16,
              .column_multiple = 16};
    case DGEMMA_WEIGHTS_INT8:
      return {.name = "INT8",
              .bits = 8,
              .scale_bytes = 0,
              .scales_are_bfloat16_or_half = false,
              .least_group = 0,
              .most_group = 0,
              .column_multiple = 1};
  }
  return {};  // no format: see is_weight_format
}

// False for a number from the C interface that is no format.
constexpr bool is_weight_format(dgemma_weight_format format) { return describe(format).bits != 0; }

constexpr bool group_fits(const WeightFormat& format, int32_t group) {
  if (format.scale_bytes == 0) return group == 0;
  return group >= format.least_group && group <= format.most_group && (group & (group - 1)) == 0;
}

// Bytes of a row's values.
constexpr int64_t row_bytes(dgemma_weight_format format, int64_t columns) {
  return columns * describe(format).bits / 8;
}

}  // namespace dgemma
