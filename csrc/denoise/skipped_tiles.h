// The rule by which the sparse soft embedding skips whole vocabulary tiles of a row, the same on a
// CPU and on a GPU.
//
// A tile's bound is on its weights, exp(dtype(z) - dtype(row_max)) summed. It is made of the tile's
// statistics, so a skipped tile is not read:
//
//   bound = kTileMargin * tile_sum * exp(tile_max + e |tile_max| - dtype(row_max))
//
// with e the unit roundoff of the dtype (0 for float32). For with d = tile_max - z >= 0
//   dtype(z) <= z + e |z| <= tile_max + e |tile_max| - (1 - e) d,
// and by Hoelder's inequality n numbers x = exp(-d), whose sum tile_sum is at least 1, have
//   sum of x^(1 - e)  <=  n^e tile_sum^(1 - e)  <=  n^e tile_sum.
//
// Tiles whose bound is at most a limit are skipped. Limits are tried from the budget for all tiles
// together down to an even share of it, which always keeps within: a long tail of tiles that are
// far below the share leaves room for larger ones.
#pragma once

#include "common/host_device.h"

namespace dgemma {
namespace {  // the CPU's instruction sets each have their own copy

constexpr float kBfloat16Roundoff = 0x1p-8f;
// 128^(2^-8) = 1.0191; the rest is for rounding in fp32: of z in the statistics, of the sum, of
// exp.
constexpr float kTileMargin = 1.02f;
// Limits grow by 4, up to half of the budget where there are 2,048 tiles.
constexpr int kTileLimits = 6;
constexpr float kTileLimitStep = 4.0f;
// p is rounded to bfloat16 after the skipped mass has been counted, which adds up to 2^-8.
constexpr float kRoundingMargin = 1.01f;

struct TileLimit {
  float limit;    // tiles with a bound up to it are skipped
  float skipped;  // their bounds, summed

  // Their share of the row's normaliser, at most `skipped` from what it is. Without it every
  // probability would be too large by the skipped mass, and some be rounded to the next bfloat16.
  DGEMMA_HOST_DEVICE float share_of_sum() const { return skipped / kTileMargin; }
};

// below[i]: the sum of the bounds up to least * kTileLimitStep^i, with least = budget / tiles.
DGEMMA_HOST_DEVICE TileLimit choose_tile_limit(const float (&below)[kTileLimits], float least,
                                               float budget) {
  TileLimit chosen = {least, below[0]};
  float limit = least;
  for (int i = 1; i < kTileLimits; ++i) {
    limit *= kTileLimitStep;
    if (below[i] <= budget) chosen = {limit, below[i]};
  }
  return chosen;
}

}  // namespace
}  // namespace dgemma
