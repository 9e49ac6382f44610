// What the dense projections over quantized weights share beside the pipeline of
// sm80/quantized_pipeline.h: the rows of weights and of input that work tiles take, and the kernel
// around its sums. Token is the element type of an input row.
#pragma once

#include "device/launch.h"
#include "grouped_gemm/cuda/dense_store.h"
#include "grouped_gemm/sm80/quantized_pipeline.h"

namespace dgemma::moe_quantized {

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

// Calls sum_up(integral constant, pipeline, work_tile) for every work tile of this block: the
// groups of 8 tokens, and what multiplies them.
template <Encoding kEncoding, int kTokens, typename Rows, typename SumUp>
DGEMMA_DEVICE void multiply_work_tiles(const DenseTileScheduler& scheduler, const Rows& rows,
                                       const SumUp& sum_up) {
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, DenseTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), scheduler, rows);
  pipeline.for_each_work_tile(
      [&](auto columns, const DenseWorkTile& work_tile) { sum_up(columns, pipeline, work_tile); });
}

// Calls store(sums, feature, token) for each 16 weight rows by 8 tokens of this warp, as the
// functions of cuda/dense_store.h take them.
template <int kColumns, typename Element, typename Store>
DGEMMA_DEVICE void for_each_product(const DenseWorkTile& work_tile,
                                    const Sum<kColumns, Element>& sum, const Store& store) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kColumns; ++group)
      store(sum[tile][group], work_tile.weight_tile * kQuantizedWeightRows + first_row(tile),
            8 * group);
}

template <Encoding kEncoding, int kTokens>
device::LaunchShape launch_shape_of(const DensePlan& plan, bool overlaps_previous_kernel) {
  return {.grid = dim3(static_cast<unsigned>(plan.blocks)),
          .threads = kQuantizedThreads,
          .shared_bytes = sizeof(Ring<kEncoding, kTokens>),
          .overlaps_previous_kernel = overlaps_previous_kernel,
          .blocks_at_once = static_cast<uint32_t>(plan.blocks_at_once)};
}

}  // namespace dgemma::moe_quantized
