// The launch plans of a feed-forward and of a dense projection over quantized weights in CUDA. The
// passes, the tables and the workspace are those of cuda/plan_moe.h, segments those of
// plan_dense.h; what differs is the tile. Pure host code that allocates nothing.
#pragma once

#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/plan_dense.h"
#include "grouped_gemm/cuda/plan_moe.h"
#include "grouped_gemm/weight_format.h"

namespace dgemma {

// Four warps one above the other, each with 32 weight rows and all tokens of the tile: a weight is
// decoded by one warp alone.
constexpr int32_t kQuantizedWeightRows = 128;
constexpr int32_t kQuantizedThreads = 128;

// The bytes of a row of weights in a stage of kMoeDepth columns: 8 or 4 bits each.
constexpr int32_t quantized_row_bytes(dgemma_weight_format format) {
  return static_cast<int32_t>(row_bytes(format, kMoeDepth));
}
// A stage's scales of a row: at most 4 bytes, which may begin in the middle of a word.
constexpr int32_t kQuantizedScaleBytes = 8;

constexpr int32_t quantized_stage_bytes(dgemma_weight_format format, int32_t token_tile) {
  const int32_t scales = describe(format).scale_bytes > 0 ? kQuantizedScaleBytes : 0;
  const int32_t token_bytes = format == DGEMMA_WEIGHTS_INT8 ? 1 : 2;  // of a value
  return kQuantizedWeightRows * (quantized_row_bytes(format) + scales) +
         token_tile * kMoeDepth * token_bytes;
}
// So many stages take at most 49,152 bytes, and two blocks share the 100 KB of a multiprocessor of
// 8.6, 8.9 or 12.0.
constexpr int32_t quantized_stages(int32_t token_tile) { return token_tile == 32 ? 4 : 3; }

// Blocks that registers must leave room for on a multiprocessor: four of 128 threads have 128 each,
// three 168, two 255. The larger tile has 64 accumulators, the smaller 32; the dense projection,
// which sums segments, twice as many.
constexpr int32_t quantized_least_blocks(int32_t token_tile, bool dense = false) {
  return token_tile == 64 ? 2 : dense ? 3 : 4;
}
// The same of INT8, of which nothing is decoded and whose dense projection has one sum alone.
constexpr int32_t int8_least_blocks(int32_t token_tile) { return token_tile == 64 ? 3 : 4; }

// The sm_90 path, for two matrices of 4 bits, has the tiles and roles of the bfloat16 path and
// steps of permuted_k.h's 128 columns.
constexpr int32_t kQuantizedDepth90 = 128;
// Steps in a stage: two where that leaves four stages or more. Waiting and copying count beside the
// products of few tokens.
constexpr int32_t quantized_steps_90(int32_t token_tile) { return token_tile <= 64 ? 2 : 1; }
// A step's scales of a row: at most 8 bytes, which may begin within a word, in whole pieces.
constexpr int32_t kQuantizedScaleBytes90 = 16;
constexpr int32_t quantized_stage_bytes_90(int32_t token_tile) {
  return quantized_steps_90(token_tile) *
         (kMoeWeightRows * (kQuantizedDepth90 / 2 + kQuantizedScaleBytes90) +
          token_tile * kQuantizedDepth90 * 2);
}
// Counts stages as moe_stages does.
constexpr int32_t quantized_stages_90(int32_t token_tile) {
  const int32_t results = token_tile * kMoeWeightRows / 2 * 2;
  return (kSharedLimit90 - results - 2048) / quantized_stage_bytes_90(token_tile);
}

// Null, or what is wrong with the sizes and formats of a call ("gate_up.group: got 48, wants ..."),
// perhaps in `text`, which has room for `bytes`. Pointers are not checked.
const char* moe_quantized_error(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes);
const char* dense_quantized_error(const dgemma_dense_quantized& op, char* text, size_t bytes);

// A plan of the sm_80 path, which serves every GPU here, or of the sm_90 path for matrices of 4
// bits on it. `stage_bytes` is of gate_up; the formats of gate_up and down may differ. The
// workspace is the same for every GPU.
MoeCudaPlan make_moe_quantized_plan(const dgemma_moe_ffn_quantized& op, const Gpu& gpu);
DensePlan make_dense_quantized_plan(const dgemma_dense_quantized& op, const Gpu& gpu);

}  // namespace dgemma
