// What the kernels of the soft embedding have in common: who takes part, and what a tile may weigh.
#pragma once

#include "denoise/cuda_logits.h"
#include "denoise/soft_embedding.h"

namespace dgemma {
namespace {

// Share of the tolerance that tiles left out may use up, of what is expected to pass. The same as
// on the CPU (cpu_soft_embedding_kernel.h).
constexpr float kTileShare = 0x1p-7f;
// What is left out is counted before p is rounded to bfloat16, which adds up to 2^-9.
constexpr float kRoundingMargin = 1.01f;

// Whether a request has work in this round: all active ones in the first, failed ones in the
// second.
DGEMMA_DEVICE bool takes_part(const SoftPass& p, int64_t request) {
  return is_active(p.logits.active, request) && (!p.dense || p.failed[request] != 0);
}

// Rows without a sum: pinned ones, which are zero, and those of a logit that is not finite.
DGEMMA_DEVICE bool has_sum(const SoftPass& p, int64_t row) {
  return !(p.pinned != nullptr && p.pinned[row] != 0) && p.row_sum[row] > 0.0;
}

DGEMMA_DEVICE float rounded(float x) { return device::to_float(device::round_to_bfloat16(x)); }

// A bound on the weights of a tile, exp(dtype(z) - dtype(row_max)) summed, from its largest z
// alone.
DGEMMA_DEVICE float tile_bound(float tile_max, float row_max) {
  return tile_max > -INFINITY ? kTile * expf(rounded(tile_max) - row_max) : 0.0f;
}

// Whether a row reads a tile. Dense rows leave out those alone that hold nothing.
DGEMMA_DEVICE bool reads_tile(const SoftPass& p, float bound) {
  const float limit =
      p.dense ? 0.0f : p.tolerance * kTileShare / static_cast<float>(p.logits.tiles);
  return bound > limit;
}

}  // namespace
}  // namespace dgemma
