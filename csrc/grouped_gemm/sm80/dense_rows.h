// The rows of weights and of input that a dense projection's work tiles take, with the pipeline of
// sm80/quantized_pipeline.h. Token is the element type of an input row.
#pragma once

#include "grouped_gemm/cuda/quantized.h"

namespace dgemma {

template <typename Token>
struct DenseRows {
  QuantizedMatrix matrix;  // [out_features, in_features]
  const Token* tokens;     // [rows, in_features]: the input
  int32_t out_features;

  DGEMMA_DEVICE int32_t first_weight_row(const DenseWorkTile&) const { return 0; }
  DGEMMA_DEVICE int32_t weight_row(const DenseWorkTile& work_tile, int32_t row) const {
    const int32_t at = work_tile.weight_tile * kQuantizedWeightRows + row;
    return at < out_features ? at : -1;
  }
  DGEMMA_DEVICE int64_t first_token_row(const DenseWorkTile& work_tile) const {
    return work_tile.first;
  }
  DGEMMA_DEVICE int32_t token_row(const DenseWorkTile&, int32_t row) const { return row; }
};

}  // namespace dgemma
