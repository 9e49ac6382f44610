#include "grouped_gemm/cuda/plan_quantized.h"

#include <algorithm>
#include <cstdio>

#include "common/ceil_divide.h"
#include "grouped_gemm/cuda/permuted_k.h"

namespace dgemma {
namespace {

// The C interface allows so many, on the CPU too.
constexpr int32_t kMostColumns = 16384;

// The tile is twice the mean number of an expert's tokens, up to the larger one, as in
// cuda/plan_moe.cpp.
int32_t choose_token_tile(int64_t pairs, int64_t experts) {
  return 2 * pairs <= 32 * experts ? 32 : 64;
}

// Blocks that a multiprocessor surely holds at once.
int32_t blocks_per_multiprocessor(dgemma_weight_format format, int32_t token_tile, bool dense,
                                  int32_t compute_capability) {
  const int32_t bytes =
      quantized_stages(token_tile) * quantized_stage_bytes(format, token_tile) + kSharedReserved;
  const int32_t by_registers = format == DGEMMA_WEIGHTS_INT8
                                   ? int8_least_blocks(token_tile)
                                   : quantized_least_blocks(token_tile, dense);
  return std::clamp(shared_bytes_of_multiprocessor(compute_capability) / bytes, 1, by_registers);
}

MoeCudaPart make_part(const MoeCudaPlan& plan, dgemma_weight_format format, int64_t weight_tiles,
                      int64_t depth, int64_t token_tiles, const Gpu& gpu) {
  const int32_t at_once =
      blocks_per_multiprocessor(format, plan.token_tile, false, gpu.compute_capability);
  const int64_t most_blocks = int64_t{gpu.multiprocessors} * at_once;
  const int64_t blocks = std::clamp<int64_t>(weight_tiles * token_tiles, 1, most_blocks);
  return {static_cast<int32_t>(weight_tiles), static_cast<int32_t>(ceil_divide(depth, kMoeDepth)),
          static_cast<int32_t>(blocks), at_once};
}

// Twice the mean number of an expert's tokens here too. More than 128 would leave no registers for
// two sets of decoded weights beside the sums.
void plan_sm90(const dgemma_moe_ffn& ffn, int64_t pairs, int32_t multiprocessors,
               MoeCudaPlan* plan) {
  plan->path = CudaPath::kSm90;
  plan->token_tile = 128;
  for (const int32_t tile : {64, 32})
    if (2 * pairs <= tile * ffn.experts) plan->token_tile = tile;
  plan->threads = kMoeThreads;
  plan->weight_rows = kMoeWeightRows;
  plan->stages = quantized_stages_90(plan->token_tile);
  plan->stage_bytes = quantized_stage_bytes_90(plan->token_tile);
  plan->depth = kQuantizedDepth90;
  plan_order(pairs, ffn.experts, plan->stages * quantized_steps_90(plan->token_tile), plan);
  const int64_t token_tiles = most_token_tiles(pairs, ffn.experts, plan->token_tile);
  const auto part = [&](int64_t weight_tiles, int64_t depth) {
    return MoeCudaPart{
        static_cast<int32_t>(weight_tiles),
        static_cast<int32_t>(ceil_divide(depth, kQuantizedDepth90)),
        static_cast<int32_t>(std::clamp<int64_t>(weight_tiles * token_tiles, 1, multiprocessors)),
        1};
  };
  plan->gate_up = part(ceil_divide(ffn.expert_size, kMoeWeightRows / 2), ffn.hidden_size);
  plan->down = part(ceil_divide(ffn.hidden_size, kMoeWeightRows), ffn.expert_size);
  const int64_t values =
      plan->tokens_per_pass * permuted_width(static_cast<int32_t>(ffn.hidden_size));
  plan->permuting_blocks =
      static_cast<int32_t>(ceil_divide(values, kPermutedPerThread * kMoeSortThreads));
}

// Null, or what is wrong with a matrix of so many columns; `rows` is what rows_per_factor divides.
const char* quantized_error(const char* name, const dgemma_quantized& matrix,
                            const char* columns_name, int64_t columns, int64_t rows, char* text,
                            size_t bytes) {
  const auto say = [&](const char* field, int64_t got, const char* wants) {
    std::snprintf(text, bytes, "%s.%s: got %lld, wants %s", name, field,
                  static_cast<long long>(got), wants);
    return static_cast<const char*>(text);
  };
  if (!is_weight_format(matrix.format))
    return say("format", matrix.format, "FP8, INT4, NVFP4 or INT8");
  const WeightFormat format = describe(matrix.format);
  if (!group_fits(format, matrix.group)) {
    switch (matrix.format) {
      case DGEMMA_WEIGHTS_FP8:
        return say("group", matrix.group, "0 for FP8");
      case DGEMMA_WEIGHTS_INT4:
        return say("group", matrix.group, "32, 64 or 128 for INT4");
      case DGEMMA_WEIGHTS_NVFP4:
        return say("group", matrix.group, "16 for NVFP4");
      case DGEMMA_WEIGHTS_INT8:
        return say("group", matrix.group, "0 for INT8");
    }
  }
  if (format.scales_are_bfloat16_or_half && matrix.scale_dtype != DGEMMA_BFLOAT16 &&
      matrix.scale_dtype != DGEMMA_FLOAT16)
    return say("scale_dtype", matrix.scale_dtype, "bfloat16 or float16 for INT4");
  // One copy moves 16 bytes: 16 values of 8 bits or 32 of 4.
  const int32_t multiple = 16 * 8 / format.bits;
  if (columns % multiple != 0 || columns > kMostColumns) {
    std::snprintf(text, bytes, "%s: got %lld, wants a multiple of %d up to %d for the format of %s",
                  columns_name, static_cast<long long>(columns), multiple, kMostColumns, name);
    return text;
  }
  if (matrix.factors != nullptr &&
      (matrix.rows_per_factor < 1 || rows % matrix.rows_per_factor != 0)) {
    char wants[48];
    std::snprintf(wants, sizeof wants, "a divisor of %lld", static_cast<long long>(rows));
    return say("rows_per_factor", matrix.rows_per_factor, wants);
  }
  return nullptr;
}

}  // namespace

const char* moe_quantized_error(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes) {
  const dgemma_moe_ffn& ffn = op.ffn;
  if (const char* error = moe_cuda_error(ffn)) return error;
  if (const char* error = quantized_error("gate_up", op.gate_up, "hidden_size", ffn.hidden_size,
                                          ffn.expert_size, text, bytes))
    return error;
  return quantized_error("down", op.down, "expert_size", ffn.expert_size, ffn.hidden_size, text,
                         bytes);
}

const char* dense_quantized_error(const dgemma_dense_quantized& op, char* text, size_t bytes) {
  const dgemma_dense& dense = op.dense;
  if (const char* error = dense_error(dense)) return error;
  return quantized_error("weight", op.weight, "in_features", dense.in_features, dense.out_features,
                         text, bytes);
}

MoeCudaPlan make_moe_quantized_plan(const dgemma_moe_ffn_quantized& op, const Gpu& gpu) {
  const dgemma_moe_ffn& ffn = op.ffn;
  MoeCudaPlan plan =
      make_moe_cuda_plan(ffn, {CudaPath::kSm80, gpu.compute_capability, gpu.multiprocessors});
  const int64_t pairs = plan.tokens_per_pass * ffn.top_k;
  if (describe(op.gate_up.format).bits == 4 && describe(op.down.format).bits == 4) {
    const auto width = [](int64_t columns) {
      return permuted_width(static_cast<int32_t>(columns));
    };
    WorkspaceParts parts = {plan.activations};
    plan.activations = parts.take<uint16_t>(pairs * width(ffn.expert_size));
    plan.products = parts.take<float>(pairs * ffn.hidden_size);
    plan.permuted_input = parts.take<uint16_t>(plan.tokens_per_pass * width(ffn.hidden_size));
    plan.workspace_bytes = parts.bytes;
    if (gpu.path == CudaPath::kSm90) {
      plan_sm90(ffn, pairs, gpu.multiprocessors, &plan);
      return plan;
    }
  }
  plan.token_tile = choose_token_tile(pairs, ffn.experts);
  plan.weight_rows = kQuantizedWeightRows;
  plan.threads = kQuantizedThreads;
  plan.stages = quantized_stages(plan.token_tile);
  plan.stage_bytes = quantized_stage_bytes(op.gate_up.format, plan.token_tile);
  const int64_t token_tiles = most_token_tiles(pairs, ffn.experts, plan.token_tile);
  plan.gate_up =
      make_part(plan, op.gate_up.format, ceil_divide(ffn.expert_size, kQuantizedWeightRows / 2),
                ffn.hidden_size, token_tiles, gpu);
  plan.down = make_part(plan, op.down.format, ceil_divide(ffn.hidden_size, kQuantizedWeightRows),
                        ffn.expert_size, token_tiles, gpu);
  WorkspaceParts parts = {plan.workspace_bytes};
  if (op.gate_up.format == DGEMMA_WEIGHTS_INT8)
    plan.input_rows = take_rows(&parts, "int8", plan.tokens_per_pass, ffn.hidden_size);
  if (op.down.format == DGEMMA_WEIGHTS_INT8)
    plan.activation_rows = take_rows(&parts, "int8", pairs, ffn.expert_size);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

DensePlan make_dense_quantized_plan(const dgemma_dense_quantized& op, const Gpu& gpu) {
  const dgemma_dense& dense = op.dense;
  DensePlan plan =
      make_dense_plan(dense, {CudaPath::kSm80, gpu.compute_capability, gpu.multiprocessors});
  plan.token_tile = dense.rows <= 32 ? 32 : 64;
  plan.weight_rows = kQuantizedWeightRows;
  plan.threads = kQuantizedThreads;
  plan.stages = quantized_stages(plan.token_tile);
  plan.stage_bytes = quantized_stage_bytes(op.weight.format, plan.token_tile);
  plan.weight_tiles = static_cast<int32_t>(ceil_divide(dense.out_features, kQuantizedWeightRows));
  plan.token_tiles = static_cast<int32_t>(ceil_divide(dense.rows, plan.token_tile));
  const int64_t work_tiles =
      int64_t{plan.weight_tiles} * plan.token_tiles * (plan.apart ? plan.segments : 1);
  plan.blocks_at_once =
      blocks_per_multiprocessor(op.weight.format, plan.token_tile, true, gpu.compute_capability);
  plan.blocks = static_cast<int32_t>(
      std::min(work_tiles, int64_t{gpu.multiprocessors} * plan.blocks_at_once));
  if (op.weight.format == DGEMMA_WEIGHTS_INT8) {
    WorkspaceParts parts = {plan.workspace_bytes};
    plan.input_rows = take_rows(&parts, "int8", dense.rows, dense.in_features);
    plan.workspace_bytes = parts.bytes;
  }
  return plan;
}

}  // namespace dgemma
