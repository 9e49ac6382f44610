// The tile scheduler of the experts' kernels: how many work tiles there are, what work tile number
// `index` is, and which steps along k it takes.
#pragma once

#include "device/language.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"
#include "grouped_gemm/cuda/plan_moe.h"

namespace dgemma {

// Schedules the work tiles of gate and up, or of down.
struct MoeTileScheduler {
  MoeTables tables;
  int32_t weight_tiles, k_steps;

  DGEMMA_DEVICE int32_t count() const { return count_work_tiles(tables, weight_tiles); }
  DGEMMA_DEVICE MoeWorkTile find(int32_t token_tile, int32_t index) const {
    return find_work_tile(tables, weight_tiles, token_tile, index);
  }
  DGEMMA_DEVICE int32_t first_step(const MoeWorkTile&) const { return 0; }
  DGEMMA_DEVICE int32_t steps(const MoeWorkTile&) const { return k_steps; }
};

}  // namespace dgemma
