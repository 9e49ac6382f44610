// The plan of the CUDA vocabulary head and its work tiles, callable from Python.
#include <cstdio>
#include <sstream>

#include "denoise/cuda/plan_head.h"
#include "entry.h"

// Sizes alone are looked at. `text` has room for `bytes`.
SIM_ENTRY head_plan(const dgemma_logits* op, int32_t multiprocessors, int64_t (&out)[4], char* text,
                    size_t bytes) {
  const dgemma::HeadPlan plan = dgemma::make_head_plan(dgemma::make_logits(*op), multiprocessors);
  const int64_t numbers[4] = {plan.row_tile, plan.row_tiles, plan.tile_pairs, plan.blocks};
  for (int i = 0; i < 4; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}

// Writes (pair of tiles, active request, row tile) of every work tile; how many there are stands in
// `count`.
SIM_ENTRY head_units(const dgemma_logits* op, int32_t active, int32_t (*out)[3], int64_t* count) {
  const dgemma::HeadPlan plan = dgemma::make_head_plan(dgemma::make_logits(*op), 132);
  *count = dgemma::count_work_tiles(plan, active);
  for (int64_t i = 0; out != nullptr && i < *count; ++i) {
    const dgemma::HeadWorkTile work_tile = dgemma::find_work_tile(plan, active, i);
    const int32_t numbers[3] = {work_tile.tile_pair, work_tile.request, work_tile.row_tile};
    for (int n = 0; n < 3; ++n) out[i][n] = numbers[n];
  }
  return nullptr;
}
