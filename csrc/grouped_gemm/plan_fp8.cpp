#include "grouped_gemm/plan_fp8.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "grouped_gemm/plan_quantized.h"

namespace dgemma {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

MoeCudaPart make_part(int64_t weight_tiles, int64_t depth, int64_t token_tiles, int64_t blocks) {
  return {static_cast<int32_t>(weight_tiles), static_cast<int32_t>(ceil_divide(depth, kFp8Depth)),
          static_cast<int32_t>(std::clamp<int64_t>(weight_tiles * token_tiles, 1, blocks))};
}

}  // namespace

const char* moe_fp8_problem(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes) {
  for (const auto& [name, matrix] : {std::pair("gate_up", &op.gate_up), {"down", &op.down}})
    if (matrix->format != DGEMMA_WEIGHTS_FP8) {
      std::snprintf(text, bytes, "%s.format: got %d, wants FP8", name, matrix->format);
      return text;
    }
  return moe_quantized_problem(op, text, bytes);
}

MoeFp8Plan make_moe_fp8_plan(const dgemma_moe_ffn_quantized& op, int32_t multiprocessors) {
  const dgemma_moe_ffn& ffn = op.ffn;
  MoeFp8Plan plan = {};
  plan.ffn = make_moe_cuda_plan(ffn, {CudaPath::kSm90, 90, multiprocessors});
  const int64_t pairs = plan.ffn.tokens_per_pass * ffn.top_k;
  // Two sets of sums, of the last 128 columns and of all, leave no registers for 256 tokens.
  plan.ffn.token_tile = std::min(plan.ffn.token_tile, 128);
  plan.ffn.stages = moe_stages(plan.ffn.token_tile);
  plan.ffn.stage_bytes = moe_stage_bytes(plan.ffn.token_tile);
  plan.ffn.depth = kFp8Depth;
  const int64_t token_tiles = most_token_tiles(pairs, ffn.experts, plan.ffn.token_tile);
  plan.ffn.gate_up = make_part(ceil_divide(ffn.expert_size, kMoeWeightRows / 2), ffn.hidden_size,
                               token_tiles, multiprocessors);
  plan.ffn.down = make_part(ceil_divide(ffn.hidden_size, kMoeWeightRows), ffn.expert_size,
                            token_tiles, multiprocessors);

  WorkspaceParts parts = {plan.ffn.workspace_bytes};
  plan.input = parts.take<uint8_t>(plan.ffn.tokens_per_pass * ffn.hidden_size);
  plan.input_scales = parts.take<float>(plan.ffn.tokens_per_pass);
  plan.activations = parts.take<uint8_t>(pairs * ffn.expert_size);
  plan.activation_scales = parts.take<float>(pairs);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

}  // namespace dgemma
