// The sources of a tile's weight rows: memory as it is, or codes that are decoded. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
//
// A tile's rows are taken when it is computed. Where registers allow it quantized weights are
// decoded by blocks instead, beside the products: see cpu/block_kernel.h.
#pragma once

#include <type_traits>

#include "grouped_gemm/cpu/decode.h"
#include "grouped_gemm/cpu/dot_tile.h"
#include "grouped_gemm/cpu/quantized.h"

namespace dgemma {
namespace {

// Half of a tile's rows: kHalfRows of them, `stride` values apart.
template <typename T>
struct HalfRows {
  const T* rows;
  int64_t stride;
};

template <typename T>
struct PlainRows {
  const T* matrix;
  int64_t columns;

  // Rows first, first + 1, ..., or `first` as each of them.
  HalfRows<T> take(int64_t first, bool repeat) {
    return {matrix + first * columns, repeat ? 0 : columns};
  }
  void multiply_row_scales(Floats* /*sums*/, int /*registers*/) const {}
  const char* stored(int64_t row) const {
    return reinterpret_cast<const char*>(matrix + row * columns);
  }
  int64_t row_bytes() const { return columns * static_cast<int64_t>(sizeof(T)); }
};

// Values in a decoded row of the scratch memory, so that each begins a cache line.
constexpr int64_t decoded_stride(int64_t columns) { return (columns + 31) / 32 * 32; }

// Bytes of scratch memory: kHalfRows rows, and their scales, of which there are the most in the
// format NVFP4.
template <typename T>
constexpr int64_t decoded_bytes(int64_t columns) {
  return kHalfRows * (decoded_stride(columns) * static_cast<int64_t>(sizeof(T)) +
                      decoded_stride(columns) / kNvfp4Group * static_cast<int64_t>(sizeof(float)));
}

// Loads the row scales (the C interface's `factors`) of rows row, row + 1, ... Neighbours share
// one, or have one each: a division for every row would be felt.
inline void load_row_scales(const dgemma_quantized& matrix, int64_t row, int64_t rows, float* to) {
  int64_t index = row / matrix.rows_per_factor;
  int64_t end = (index + 1) * matrix.rows_per_factor;
  for (int64_t r = 0; r < rows; ++r, ++row) {
    if (row == end) {
      ++index;
      end += matrix.rows_per_factor;
    }
    to[r] = matrix.factors[index];
  }
}

template <typename T, dgemma_weight_format kFormat>
class DecodedRows {
 public:
  // Row 0 stands for `first_row` of the matrix; `scratch` has decoded_bytes.
  DecodedRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns, void* scratch)
      : matrix_(matrix),
        first_row_(first_row),
        columns_(columns),
        scales_per_row_(count_scales<kFormat>(columns, matrix.group)),
        values_(static_cast<T*>(scratch)),
        scales_(reinterpret_cast<float*>(values_ + kHalfRows * decoded_stride(columns))) {}

  HalfRows<T> take(int64_t first, bool repeat) {
    const int64_t stride = decoded_stride(columns_);
    const int rows = repeat ? 1 : kHalfRows;
    const float* scales = load_scales(first, rows);
    for (int r = 0; r < rows; ++r)
      decode_row<kFormat>(codes(first + r), scales + r * scales_per_row_, matrix_.group, columns_,
                          values_ + r * stride);
    take_row_scales(first, repeat);
    return {values_, repeat ? 0 : stride};
  }

  void multiply_row_scales(Floats* sums, int registers) const {
    if (matrix_.factors == nullptr) return;
    for (int i = 0; i < registers; ++i) sums[i] *= row_scales_[i];
  }
  const char* stored(int64_t row) const { return reinterpret_cast<const char*>(codes(row)); }
  int64_t row_bytes() const { return dgemma::row_bytes(kFormat, columns_); }

 private:
  const uint8_t* codes(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.values) + (first_row_ + row) * row_bytes();
  }

  const float* load_scales(int64_t row, int64_t rows) {
    const uint8_t* stored = static_cast<const uint8_t*>(matrix_.scales) +
                            (first_row_ + row) * scales_per_row_ * kScaleBytes<kFormat>;
    convert_scales<kFormat>(stored, rows * scales_per_row_, matrix_.scale_dtype, scales_);
    return scales_;
  }

  void take_row_scales(int64_t first, bool repeat) {
    if (matrix_.factors == nullptr) return;
    float factor[kHalfRows] = {};
    load_row_scales(matrix_, first_row_ + first, repeat ? 1 : kHalfRows, factor);
    for (int r = 1; repeat && r < kHalfRows; ++r) factor[r] = factor[0];
    for (int i = 0; i < kTileTokens * kHalfRows; ++i)
      row_scales_[i / kLanes][folded_lane(i % kLanes)] = factor[i % kHalfRows];
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  const int64_t scales_per_row_;
  T* const values_;
  float* const scales_;
  Floats row_scales_[registers_for(kTileTokens * kHalfRows)] = {};
};

// Calls run(std::integral_constant of the format) for the formats whose weights are decoded.
template <typename Run>
inline void with_format(dgemma_weight_format format, Run run) {
  switch (format) {
    case DGEMMA_WEIGHTS_FP8:
      return run(std::integral_constant<dgemma_weight_format, DGEMMA_WEIGHTS_FP8>{});
    case DGEMMA_WEIGHTS_INT4:
      return run(std::integral_constant<dgemma_weight_format, DGEMMA_WEIGHTS_INT4>{});
    case DGEMMA_WEIGHTS_NVFP4:
      return run(std::integral_constant<dgemma_weight_format, DGEMMA_WEIGHTS_NVFP4>{});
    case DGEMMA_WEIGHTS_INT8:  // multiplied as they are: cpu/int8_kernel.h
      return;
  }
}

}  // namespace
}  // namespace dgemma

// Scratch memory of one DecodedRows, in the caller's frame.
#define DGEMMA_DECODED_SCRATCH(T, columns) \
  __builtin_alloca_with_align(static_cast<size_t>(decoded_bytes<T>(columns)), 512 /* bits */)
