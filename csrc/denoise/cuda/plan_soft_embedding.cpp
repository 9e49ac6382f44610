#include "denoise/cuda/plan_soft_embedding.h"

#include <ostream>

#include "common/ceil_divide.h"
#include "denoise/cuda/plan_head.h"

namespace dgemma {

const char* soft_embedding_error(const dgemma_soft_embedding& op) {
  if (op.logits.dtype != DGEMMA_BFLOAT16) return "dtype: wants bfloat16";
  // A row is copied 16 bytes at a time.
  if (op.hidden_size < 8 || op.hidden_size > 65536 || op.hidden_size % 8 != 0)
    return "hidden_size: wants a multiple of 8 up to 65536";
  return nullptr;
}

SoftPlan make_soft_plan(const dgemma_soft_embedding& op, CudaPath path) {
  const Logits logits = make_logits(op.logits);
  const int64_t rows = static_cast<int64_t>(logits.batch) * logits.length;
  SoftPlan plan = {};
  plan.path = path;
  plan.row_tile = path == CudaPath::kSm90 ? vocabulary_row_tile(logits.length) : kSoftRows;
  plan.row_tiles = ceil_divide(logits.length, plan.row_tile);
  plan.column_tiles = static_cast<int32_t>(ceil_divide(op.hidden_size, kSoftColumns));
  plan.splits = kSoftSplits;
  WorkspaceParts parts;
  plan.normaliser = parts.take<float>(rows);
  plan.limit = parts.take<float>(rows);
  plan.skipped_mass = parts.take<float>(rows);
  plan.needed = parts.take<uint32_t>(static_cast<int64_t>(logits.batch) * logits.tiles);
  plan.list = parts.take<int32_t>(static_cast<int64_t>(logits.batch) * logits.tiles);
  plan.count = parts.take<int32_t>(logits.batch);
  plan.failed = parts.take<uint32_t>(logits.batch);
  plan.probabilities = parts.take<uint16_t>(rows * logits.tiles * DGEMMA_VOCABULARY_TILE);
  plan.partial = parts.take<float>(rows * plan.splits * op.hidden_size);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

void print(const SoftPlan& plan, std::ostream& out) {
  out << "soft product: " << plan.column_tiles << " x " << plan.row_tiles << " tiles of "
      << plan.row_tile << " rows by " << kSoftColumns << " columns, " << plan.splits
      << " splits of the listed vocabulary tiles, steps of " << kSoftDepth << "\n"
      << "workspace: " << plan.workspace_bytes << " bytes\n";
}

SoftPass make_soft_pass(const dgemma_soft_embedding& op, const SoftPlan& plan, bool dense) {
  char* const base = static_cast<char*>(op.workspace);
  const auto floats = [base](size_t at) { return reinterpret_cast<float*>(base + at); };
  const auto integers = [base](size_t at) { return reinterpret_cast<int32_t*>(base + at); };
  const auto words = [base](size_t at) { return reinterpret_cast<uint32_t*>(base + at); };
  SoftPass pass = {};
  pass.logits = make_logits(op.logits);
  pass.row_max = op.row_max;
  pass.row_sum = op.row_sum;
  pass.tile_max = op.tile_max;
  pass.tile_sum = op.tile_sum;
  pass.pinned = op.pinned;
  pass.embedding = static_cast<const device::bfloat16*>(op.embedding);
  pass.output = static_cast<device::bfloat16*>(op.output);
  pass.normaliser = floats(plan.normaliser);
  pass.limit = floats(plan.limit);
  pass.skipped_mass = floats(plan.skipped_mass);
  pass.needed = words(plan.needed);
  pass.list = integers(plan.list);
  pass.count = integers(plan.count);
  pass.failed = words(plan.failed);
  pass.probabilities = reinterpret_cast<device::bfloat16*>(base + plan.probabilities);
  pass.partial = floats(plan.partial);
  pass.embedding_scale = op.embedding_scale;
  pass.tolerance = op.tolerance;
  pass.max_embedding_norm = op.max_embedding_norm;
  pass.hidden_size = static_cast<int32_t>(op.hidden_size);
  pass.dense = dense;
  return pass;
}

}  // namespace dgemma
