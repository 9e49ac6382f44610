// The launch plan of the feed-forward with weights and activations in FP8. Hopper takes the tiles
// of cuda/plan_moe.h, a stage holding 128 columns of e4m3 where it held 64 of bfloat16; 8.9 and
// 12.0 take those of plan_quantized.h, with tokens of half the bytes. Pure host code that allocates
// nothing.
#pragma once

#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/plan_moe.h"
#include "grouped_gemm/cuda/plan_quantized.h"

namespace dgemma {

// Columns in a stage: a row of the widest swizzle. Also how many products are summed before the sum
// is added in fp32 (device/wgmma.h).
constexpr int32_t kFp8Depth = 128;

// The bytes of a stage on 8.9 and 12.0, which is kMoeDepth columns deep.
constexpr int32_t fp8_stage_bytes_89(int32_t token_tile) {
  return (kQuantizedWeightRows + token_tile) * kMoeDepth;
}
// Blocks that share the 100 KB of a multiprocessor there, with the stages of plan_quantized.h: at
// most 40,960 bytes each.
constexpr int32_t kFp8LeastBlocks89 = 2;
constexpr bool fp8_blocks_fit_89(int32_t token_tile) {
  const int32_t bytes =
      quantized_stages(token_tile) * fp8_stage_bytes_89(token_tile) + kSharedReserved;
  return kFp8LeastBlocks89 * bytes <= shared_bytes_of_multiprocessor(89);
}
static_assert(fp8_blocks_fit_89(32) && fp8_blocks_fit_89(64));

// The same as moe_quantized_error, and both matrices must be FP8.
const char* moe_fp8_error(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes);

// Plans for a GPU whose tensor cores multiply e4m3: by wgmma on path kSm90, by mma.sync on the
// other. The workspace is the same for every GPU.
MoeCudaPlan make_moe_fp8_plan(const dgemma_moe_ffn_quantized& op, const Gpu& gpu);

}  // namespace dgemma
