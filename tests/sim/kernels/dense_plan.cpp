// The plan of the CUDA dense projection and its work tiles, callable from Python.
#include <cstdio>
#include <sstream>

#include "entry.h"
#include "grouped_gemm/cuda/dense.h"

namespace {
dgemma::DensePlan make(const dgemma_dense& op, int32_t compute_capability,
                       int32_t multiprocessors) {
  using dgemma::CudaPath;
  const CudaPath path = compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80;
  return dgemma::make_dense_plan(op, {path, compute_capability, multiprocessors});
}
}  // namespace

// Null, or what is wrong with the sizes. `text` has room for `bytes`.
SIM_ENTRY dense_plan(const dgemma_dense* op, int32_t compute_capability, int32_t multiprocessors,
                     int64_t (&out)[10], char* text, size_t bytes) {
  if (const char* error = dgemma::dense_error(*op)) return error;
  const dgemma::DensePlan plan = make(*op, compute_capability, multiprocessors);
  const int64_t numbers[10] = {plan.token_tile,    plan.weight_rows,
                               plan.weight_tiles,  plan.token_tiles,
                               plan.k_steps,       plan.segments,
                               plan.apart ? 1 : 0, plan.blocks,
                               plan.sum_blocks,    static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 10; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}

// Writes (weight tile, first row, rows, first step, steps) of every work tile; how many there are
// stands in `count`.
SIM_ENTRY dense_units(const dgemma_dense* op, int32_t compute_capability, int32_t (*out)[5],
                      int32_t* count) {
  const dgemma::DensePlan plan = make(*op, compute_capability, 132);
  const dgemma::DenseTileScheduler scheduler = {static_cast<int32_t>(op->rows),
                                                plan.weight_tiles,
                                                plan.token_tiles,
                                                plan.k_steps,
                                                plan.segments,
                                                plan.apart};
  *count = scheduler.count();
  for (int32_t i = 0; out != nullptr && i < *count; ++i) {
    const dgemma::DenseWorkTile work_tile = scheduler.find(plan.token_tile, i);
    const int32_t numbers[5] = {work_tile.weight_tile, work_tile.first, work_tile.rows,
                                scheduler.first_step(work_tile), scheduler.steps(work_tile)};
    for (int n = 0; n < 5; ++n) out[i][n] = numbers[n];
  }
  return nullptr;
}
