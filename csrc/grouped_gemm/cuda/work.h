// What the multiplying kernels of both paths take as work: how many units there are, what unit
// number `index` is, and which steps along k it takes.
#pragma once

#include "device/language.h"
#include "grouped_gemm/cuda/plan_moe.h"
#include "grouped_gemm/cuda/units.h"

namespace dgemma {

// The units of gate and up, or of down.
struct MoeWork {
  MoeTables tables;
  int32_t weight_tiles, k_steps;

  DGEMMA_DEVICE int32_t count() const { return count_units(tables, weight_tiles); }
  DGEMMA_DEVICE MoeUnit find(int32_t token_tile, int32_t index) const {
    return find_unit(tables, weight_tiles, token_tile, index);
  }
  DGEMMA_DEVICE int32_t first_step(const MoeUnit&) const { return 0; }
  DGEMMA_DEVICE int32_t steps(const MoeUnit&) const { return k_steps; }
};

}  // namespace dgemma
