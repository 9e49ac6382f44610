#include "grouped_gemm/cuda/plan_moe.h"

#include <algorithm>
#include <ostream>

#include "common/ceil_divide.h"

namespace dgemma {
namespace {

constexpr int64_t kLargestExtent = INT32_MAX;

// Token tiles that there is code for, sm_80 and sm_90. 256 is wgmma's largest N; on sm_80 128
// tokens take 64 accumulators of a thread.
constexpr int32_t kTokenTiles80[] = {32, 64, 128};
constexpr int32_t kTokenTiles90[] = {64, 128, 256};

int64_t tokens_per_pass(const dgemma_moe_ffn& op) {
  return std::min(op.tokens, std::max<int64_t>(1, kMoePairsPerPass / op.top_k));
}

// Twice the mean number of an expert's tokens, so that an expert with twice its share still reads
// its weights once.
int32_t choose_token_tile(CudaPath path, int64_t pairs, int64_t experts) {
  const auto& tiles = path == CudaPath::kSm90 ? kTokenTiles90 : kTokenTiles80;
  for (const int32_t tile : tiles)
    if (2 * pairs <= tile * experts) return tile;
  return tiles[2];
}

MoeCudaPart make_part(int64_t weight_tiles, int64_t depth, int64_t token_tiles,
                      int32_t multiprocessors, int32_t blocks_at_once) {
  const int64_t most_blocks = int64_t{multiprocessors} * blocks_at_once;
  const int64_t blocks = std::clamp<int64_t>(weight_tiles * token_tiles, 1, most_blocks);
  return {static_cast<int32_t>(weight_tiles), static_cast<int32_t>(ceil_divide(depth, kMoeDepth)),
          static_cast<int32_t>(blocks), blocks_at_once};
}

}  // namespace

const char* moe_cuda_error(const dgemma_moe_ffn& op) {
  const auto outside = [](int64_t value, int64_t least, int64_t most) {
    return value < least || value > most;
  };
  if (outside(op.tokens, 0, kLargestExtent)) return "tokens: wants 0 to 2147483647";
  // A router has fewer choices than experts; the bound keeps a pass's pairs in 32 bits.
  if (outside(op.top_k, 1, kMoePairsPerPass)) return "top_k: wants 1 to 32768";
  if (outside(op.experts, 1, kMoeMostExperts)) return "experts: wants 1 to 1024";
  if (op.dtype != DGEMMA_BFLOAT16) return "dtype: wants bfloat16";
  // TMA's strides are multiples of 16 bytes (device/tensor_layout.h), and 2^16 keeps every product
  // of two extents and of a pass's pairs in 32 and 64 bits.
  if (outside(op.hidden_size, 8, 65536) || op.hidden_size % 8 != 0)
    return "hidden_size: wants a multiple of 8 up to 65536";
  if (outside(op.expert_size, 8, 65536) || op.expert_size % 8 != 0)
    return "expert_size: wants a multiple of 8 up to 65536";
  return nullptr;
}

// An upper bound: every expert that has pairs may have one tile that is not full.
int64_t most_token_tiles(int64_t pairs, int64_t experts, int32_t token_tile) {
  return std::min(pairs, experts + pairs / token_tile);
}

int32_t moe_blocks_per_multiprocessor_80(int32_t token_tile, int32_t compute_capability) {
  const int32_t bytes =
      moe_stages_80(token_tile) * moe_stage_bytes_80(token_tile) + kSharedReserved;
  return std::clamp(shared_bytes_of_multiprocessor(compute_capability) / bytes, 1,
                    moe_least_blocks_80(token_tile));
}

void plan_order(int64_t pairs, int64_t experts, int32_t ring_steps, MoeCudaPlan* plan) {
  plan->contiguous = 2 * pairs <= plan->token_tile * experts;  // the tile is twice the mean
  // With a mean of eight pairs and uniform routing one expert in 3,000 has none.
  plan->likely_steps = plan->contiguous && pairs >= 8 * experts ? ring_steps : 0;
}

MoeCudaPlan make_moe_cuda_plan(const dgemma_moe_ffn& op, const Gpu& gpu) {
  MoeCudaPlan plan = {};
  plan.tokens_per_pass = tokens_per_pass(op);
  plan.path = gpu.path;
  const int64_t pairs = plan.tokens_per_pass * op.top_k;
  plan.token_tile = choose_token_tile(gpu.path, pairs, op.experts);
  plan.depth = kMoeDepth;
  int32_t blocks_at_once = 1;  // on sm_90 a block takes almost all of the shared memory
  if (gpu.path == CudaPath::kSm90) {
    plan.weight_rows = kMoeWeightRows;
    plan.threads = kMoeThreads;
    plan.stages = moe_stages(plan.token_tile);
    plan.stage_bytes = moe_stage_bytes(plan.token_tile);
    plan_order(pairs, op.experts, plan.stages, &plan);
  } else {
    plan.weight_rows = kMoeWeightRows80;
    plan.threads = kMoeThreads80;
    plan.stages = moe_stages_80(plan.token_tile);
    plan.stage_bytes = moe_stage_bytes_80(plan.token_tile);
    blocks_at_once = moe_blocks_per_multiprocessor_80(plan.token_tile, gpu.compute_capability);
  }

  const int64_t token_tiles = most_token_tiles(pairs, op.experts, plan.token_tile);
  const int64_t gate_up_tiles = ceil_divide(op.expert_size, plan.weight_rows / 2);
  const int64_t down_tiles = ceil_divide(op.hidden_size, plan.weight_rows);
  const auto part = [&](int64_t weight_tiles, int64_t depth) {
    return make_part(weight_tiles, depth, token_tiles, gpu.multiprocessors, blocks_at_once);
  };
  plan.gate_up = part(gate_up_tiles, op.hidden_size);
  plan.down = part(down_tiles, op.expert_size);
  plan.combine_blocks = static_cast<int32_t>(
      ceil_divide(plan.tokens_per_pass * op.hidden_size / 8, kMoeCombineThreads));

  WorkspaceParts parts;
  plan.first = parts.take<int32_t>(op.experts + 1);
  plan.tiles_before = parts.take<int32_t>(op.experts + 1);
  plan.pair = parts.take<int32_t>(pairs);
  plan.activations = parts.take<uint16_t>(pairs * op.expert_size);
  plan.products = parts.take<float>(pairs * op.hidden_size);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

void print(const char* name, const RowsPlan& plan, std::ostream& out) {
  if (plan.blocks > 0)
    out << name << " to " << plan.type << ": " << plan.blocks << " blocks of "
        << kQuantizeRowsThreads << " threads\n";
}

void print(const MoeCudaPlan& plan, std::ostream& out) {
  const auto part = [&](const char* name, const MoeCudaPart& p) {
    out << name << ": " << p.blocks << " blocks of " << plan.threads << " threads, "
        << p.weight_tiles << " weight tiles of " << plan.weight_rows << " rows per expert, "
        << p.k_steps << " steps of " << plan.depth << ", token tiles of " << plan.token_tile << ", "
        << plan.stages << " stages of " << plan.stage_bytes << " bytes\n";
  };
  out << "pass: " << plan.tokens_per_pass << " tokens\n";
  part("gate_up", plan.gate_up);
  part("down", plan.down);
  if (plan.path == CudaPath::kSm90)
    out << "order: " << (plan.contiguous ? "contiguous runs" : "every blocks-th work tile") << ", "
        << plan.likely_steps << " steps of weights asked for early\n";
  print("input", plan.input_rows, out);
  print("activations", plan.activation_rows, out);
  out << "combine: " << plan.combine_blocks << " blocks of " << kMoeCombineThreads << " threads\n";
  out << "workspace: " << plan.workspace_bytes << " bytes\n";
}

}  // namespace dgemma
