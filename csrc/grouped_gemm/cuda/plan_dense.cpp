#include "grouped_gemm/cuda/plan_dense.h"

#include <algorithm>
#include <ostream>

#include "common/ceil_divide.h"
#include "grouped_gemm/cuda/plan_moe.h"

namespace dgemma {
namespace {

// Blocks that fill a GPU: the multiprocessors of an H100 or H200. Not asked of the GPU at hand, so
// that a row's bits are the same on all of one path.
constexpr int64_t kFill = 132;
// A canvas has 256 rows: two token tiles of 128.
constexpr int64_t kTokenTilesOfCanvas = 2;
constexpr int64_t kTile = 128;
// A segment of fewer stages would spend more on its partial sums than on its products: 64 KB of
// those per 128 x 128 tile, against 32 KB that a stage reads.
constexpr int64_t kFewestSteps = 4;

int32_t choose_segments(const dgemma_dense& op) {
  const int64_t tiles = kTokenTilesOfCanvas * ceil_divide(op.out_features, kTile);
  const int64_t most = std::max<int64_t>(1, ceil_divide(op.in_features, kMoeDepth) / kFewestSteps);
  return static_cast<int32_t>(std::clamp<int64_t>(kFill / tiles, 1, most));
}

int32_t choose_token_tile(CudaPath path, int64_t rows) {
  if (path == CudaPath::kSm80 && rows <= 32) return 32;
  return rows <= 64 ? 64 : 128;
}

}  // namespace

const char* dense_error(const dgemma_dense& op) {
  const auto outside = [](int64_t value, int64_t least, int64_t most) {
    return value < least || value > most;
  };
  if (outside(op.rows, 0, INT32_MAX)) return "rows: wants 0 to 2147483647";
  if (op.dtype != DGEMMA_BFLOAT16) return "dtype: wants bfloat16";
  // 16 bytes, which one copy moves; 2^16 keeps products of two extents in 32 bits.
  if (outside(op.in_features, 8, 65536) || op.in_features % 8 != 0)
    return "in_features: wants a multiple of 8 up to 65536";
  if (outside(op.out_features, 8, 65536) || op.out_features % 8 != 0)
    return "out_features: wants a multiple of 8 up to 65536";
  // Work tiles are counted in 32 bits: 2^22 tiles of 128 rows by 2^9 of 128 features at most.
  if (ceil_divide(op.rows, kTile) * ceil_divide(op.out_features, kTile) > INT32_MAX / 8)
    return "rows: wants fewer tiles of 128 rows by 128 out_features than 268435456";
  return nullptr;
}

DensePlan make_dense_plan(const dgemma_dense& op, const Gpu& gpu) {
  DensePlan plan = {};
  const bool sm90 = gpu.path == CudaPath::kSm90;
  plan.path = gpu.path;
  plan.token_tile = choose_token_tile(gpu.path, op.rows);
  plan.weight_rows = sm90 ? kMoeWeightRows : kMoeWeightRows80;
  plan.threads = sm90 ? kMoeThreads : kMoeThreads80;
  plan.stages = sm90 ? moe_stages(plan.token_tile) : moe_stages_80(plan.token_tile);
  plan.stage_bytes = sm90 ? moe_stage_bytes(plan.token_tile) : moe_stage_bytes_80(plan.token_tile);
  plan.weight_tiles = static_cast<int32_t>(ceil_divide(op.out_features, plan.weight_rows));
  plan.token_tiles = static_cast<int32_t>(ceil_divide(op.rows, plan.token_tile));
  plan.k_steps = static_cast<int32_t>(ceil_divide(op.in_features, kMoeDepth));
  plan.segments = choose_segments(op);
  plan.apart = plan.segments > 1 &&
               ceil_divide(op.rows, kTile) * ceil_divide(op.out_features, kTile) < kFill;

  const int64_t work_tiles =
      static_cast<int64_t>(plan.weight_tiles) * plan.token_tiles * (plan.apart ? plan.segments : 1);
  plan.blocks_at_once =
      sm90 ? 1 : moe_blocks_per_multiprocessor_80(plan.token_tile, gpu.compute_capability);
  plan.blocks = static_cast<int32_t>(
      std::min(work_tiles, int64_t{gpu.multiprocessors} * plan.blocks_at_once));
  if (plan.apart) {
    plan.sum_blocks =
        static_cast<int32_t>(ceil_divide(op.rows * op.out_features / 8, kSumSegmentsThreads));
    WorkspaceParts parts;
    parts.take<float>(plan.segments * op.rows * op.out_features);
    plan.workspace_bytes = parts.bytes;
  }
  return plan;
}

void print(const DensePlan& plan, std::ostream& out) {
  print("input", plan.input_rows, out);
  out << "product: " << plan.blocks << " blocks of " << plan.threads << " threads, "
      << plan.weight_tiles << " weight tiles of " << plan.weight_rows << " rows, "
      << plan.token_tiles << " token tiles of " << plan.token_tile << ", " << plan.k_steps
      << " steps of " << kMoeDepth << " in " << plan.segments << " segments "
      << (plan.apart ? "apart" : "in turn") << ", " << plan.stages << " stages of "
      << plan.stage_bytes << " bytes\n";
  out << "sum: " << plan.sum_blocks << " blocks of " << kSumSegmentsThreads << " threads\n";
  out << "workspace: " << plan.workspace_bytes << " bytes\n";
}

}  // namespace dgemma
