// The kernels of the soft embedding share these: which requests are in a round, and which tiles a
// row needs.
#pragma once

#include "denoise/cuda/logits.h"
#include "denoise/cuda/plan_soft_embedding.h"
#include "denoise/skipped_tiles.h"

namespace dgemma {
namespace {

// Fraction of the tolerance that is budgeted for skipped tiles. What may be skipped depends on the
// norm of the row's result, which is not known before it is made: a fraction of n / (n + largest
// norm of an embedding), or 1/4 for a norm of a third of the largest.
constexpr float kTileShare = 0.25f;

// True when a request has work in this round: active ones in the first, failed ones in the second.
DGEMMA_DEVICE bool is_in_round(const SoftPass& p, int64_t request) {
  return is_active(p.logits.active, request) && (!p.dense || p.failed[request] != 0);
}

// Rows without a sum: pinned ones, which are zero, and those of a logit that is not finite.
DGEMMA_DEVICE bool has_sum(const SoftPass& p, int64_t row) {
  return !(p.pinned != nullptr && p.pinned[row] != 0) && p.row_sum[row] > 0.0;
}

DGEMMA_DEVICE float rounded(float x) { return device::to_float(device::round_to_bfloat16(x)); }

// A bound on the weights of a tile of a row: see skipped_tiles.h. The same bits in every kernel.
DGEMMA_DEVICE float tile_bound(const SoftPass& p, int64_t row, int32_t tile, float row_max) {
  const int64_t at = row * p.logits.tiles + tile;
  const float top = p.tile_max[at], sum = p.tile_sum[at];
  const float exponent = fmaf(fabsf(top), kBfloat16Roundoff, top) - row_max;
  return top > -INFINITY ? expf(exponent) * (sum * kTileMargin) : 0.0f;
}

// A warp takes four tiles of a row at a time, eight lanes each: their chains of tanh and exp run
// side by side, and a bound or a sum is made once for a lane's sixteen entries.
constexpr int kSoftLanes = 8;
constexpr int32_t kTilesAtOnce = 32 / kSoftLanes;
using SoftTile = RowOfTile<kSoftLanes>;

// A lane's logits of a tile, from `first` on: four at a time unless rows begin in between. What is
// not there is zero.
DGEMMA_DEVICE void read_tile(const device::bfloat16* row, int32_t width, int32_t first, bool there,
                             float (&value)[SoftTile::kEntries]) {
  uint2 four[SoftTile::kQuads];
  if (width % kLaneEntries == 0) {
#pragma unroll
    for (int quad = 0; quad < SoftTile::kQuads; ++quad) {
      const int32_t at = first + SoftTile::offset(quad * kLaneEntries);
      four[quad] = there && at < width ? *reinterpret_cast<const uint2*>(row + at) : uint2{0, 0};
    }
  } else {
#pragma unroll
    for (int quad = 0; quad < SoftTile::kQuads; ++quad) {
      const int32_t at = first + SoftTile::offset(quad * kLaneEntries);
      uint32_t bits[kLaneEntries];
#pragma unroll
      for (int i = 0; i < kLaneEntries; ++i)
        bits[i] = there && at + i < width ? row[at + i].bits : 0;
      four[quad] = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
    }
  }
#pragma unroll
  for (int quad = 0; quad < SoftTile::kQuads; ++quad) {
    value[kLaneEntries * quad] = device::low_to_float(four[quad].x);
    value[kLaneEntries * quad + 1] = device::high_to_float(four[quad].x);
    value[kLaneEntries * quad + 2] = device::low_to_float(four[quad].y);
    value[kLaneEntries * quad + 3] = device::high_to_float(four[quad].y);
  }
}

// The address of a lane's first entry of a row's tile, among z and probabilities.
DGEMMA_DEVICE device::bfloat16* soft_entries(const SoftPass& p, int64_t row, int32_t tile) {
  return p.probabilities + (row * p.logits.tiles + tile) * kTile +
         static_cast<int32_t>(device::lane_index()) % kSoftLanes * kLaneEntries;
}

}  // namespace
}  // namespace dgemma
