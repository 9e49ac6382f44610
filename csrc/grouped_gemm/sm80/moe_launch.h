// What every kernel of gate and up, or of down, that multiplies by mma.sync is launched with.
#pragma once

#include "device/launch.h"
#include "grouped_gemm/cuda/moe_scheduler.h"

namespace dgemma {

inline MoeTileScheduler scheduler_of(const MoeTables& tables, const MoeCudaPart& part) {
  return {.tables = tables, .weight_tiles = part.weight_tiles, .k_steps = part.k_steps};
}

inline device::LaunchShape launch_shape_of(const MoeCudaPart& part, uint32_t threads,
                                           uint32_t shared_bytes) {
  return {.grid = dim3(static_cast<unsigned>(part.blocks)),
          .threads = threads,
          .shared_bytes = shared_bytes,
          .overlaps_previous_kernel = true,
          .blocks_at_once = static_cast<uint32_t>(part.blocks_at_once)};
}

}  // namespace dgemma
