#include "grouped_gemm/cuda/plan_fp8.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "common/ceil_divide.h"

namespace dgemma {
namespace {

MoeCudaPart make_part(int64_t weight_tiles, int64_t depth, int64_t token_tiles, int64_t blocks) {
  return {static_cast<int32_t>(weight_tiles), static_cast<int32_t>(ceil_divide(depth, kFp8Depth)),
          static_cast<int32_t>(std::clamp<int64_t>(weight_tiles * token_tiles, 1, blocks)), 1};
}

MoeCudaPlan make_wgmma_plan(const dgemma_moe_ffn& ffn, const Gpu& gpu) {
  MoeCudaPlan plan = make_moe_cuda_plan(ffn, gpu);
  const int64_t pairs = plan.tokens_per_pass * ffn.top_k;
  // Two sets of sums, of the last 128 columns and of all, leave no registers for 256 tokens.
  plan.token_tile = std::min(plan.token_tile, 128);
  plan.stages = moe_stages(plan.token_tile);
  plan.stage_bytes = moe_stage_bytes(plan.token_tile);
  plan.depth = kFp8Depth;
  plan_order(pairs, ffn.experts, plan.stages, &plan);
  const int64_t token_tiles = most_token_tiles(pairs, ffn.experts, plan.token_tile);
  plan.gate_up = make_part(ceil_divide(ffn.expert_size, kMoeWeightRows / 2), ffn.hidden_size,
                           token_tiles, gpu.multiprocessors);
  plan.down = make_part(ceil_divide(ffn.hidden_size, kMoeWeightRows), ffn.expert_size, token_tiles,
                        gpu.multiprocessors);
  return plan;
}

// The tiles, steps and blocks of the same weights with activations in bfloat16: two of either's
// blocks share a multiprocessor.
MoeCudaPlan make_mma_plan(const dgemma_moe_ffn_quantized& op, const Gpu& gpu) {
  MoeCudaPlan plan = make_moe_quantized_plan(op, gpu);
  plan.stage_bytes = fp8_stage_bytes_89(plan.token_tile);
  return plan;
}

}  // namespace

const char* moe_fp8_error(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes) {
  for (const auto& [name, matrix] : {std::pair("gate_up", &op.gate_up), {"down", &op.down}})
    if (matrix->format != DGEMMA_WEIGHTS_FP8) {
      std::snprintf(text, bytes, "%s.format: got %d, wants FP8", name, matrix->format);
      return text;
    }
  return moe_quantized_error(op, text, bytes);
}

MoeCudaPlan make_moe_fp8_plan(const dgemma_moe_ffn_quantized& op, const Gpu& gpu) {
  const dgemma_moe_ffn& ffn = op.ffn;
  MoeCudaPlan plan =
      gpu.path == CudaPath::kSm90 ? make_wgmma_plan(ffn, gpu) : make_mma_plan(op, gpu);
  WorkspaceParts parts = {plan.workspace_bytes};
  plan.input_rows = take_rows(&parts, "e4m3", plan.tokens_per_pass, ffn.hidden_size);
  plan.activation_rows =
      take_rows(&parts, "e4m3", plan.tokens_per_pass * ffn.top_k, ffn.expert_size);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

}  // namespace dgemma
