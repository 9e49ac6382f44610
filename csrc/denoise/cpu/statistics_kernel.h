// Statistics of one row in one pass over its raw logits.
#pragma once

#include "denoise/cpu/masses.h"

namespace dgemma {
namespace {

// The lowest allowed index in the tile whose raw logit is `value`.
template <typename T>
int32_t find_in_tile(const LogitRow<T>& row, int64_t tile, float value) {
  const int64_t first = tile * kTile;
  for (int64_t v = first; v < first + kTile && v < row.vocabulary; ++v)
    if (is_allowed(row.allowed, v) && to_float(row.raw[v]) == value) return static_cast<int32_t>(v);
  return static_cast<int32_t>(first);
}

template <typename T>
void statistics_row(const dgemma_vocabulary_statistics& op, int64_t row_number) {
  if (!is_active(op.logits, row_number)) return;
  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  const int64_t tiles = tiles_of(row.vocabulary);
  float* const tile_max = op.tile_max + row_number * tiles;
  float* const tile_sum = op.tile_sum + row_number * tiles;

  float tile_shifted[kSpanTiles];
  ShiftedSums sums;
  Floats poison = broadcast(0.0f);
  float best = -INFINITY;
  // The argmax of a row of NaN is the lowest token that it allows.
  int32_t argmax = nth_allowed(row.allowed, row.vocabulary, 0);
  TileLogits tile;
  for (int64_t j = 0; j < tiles; ++j) {
    tile_max[j] = -INFINITY;
    tile_sum[j] = tile_shifted[j % kSpanTiles] = 0.0f;
    if (!tile_is_empty(row.allowed, row.vocabulary, j)) {
      read_tile(row, j, &tile);
      poison += tile.poison;
      const TileMasses masses = tile_masses(tile);
      tile_max[j] = masses.max;
      tile_sum[j] = masses.mass;
      tile_shifted[j % kSpanTiles] = masses.shifted;
      const float largest = horizontal_max(tile.largest_raw);
      if (largest > best) {
        best = largest;
        argmax = find_in_tile(row, j, largest);
      }
    }
    const int64_t span = j % kSpanTiles + 1;
    if (span == kSpanTiles || j + 1 == tiles)
      sums.add(tile_max + j + 1 - span, tile_sum + j + 1 - span, tile_shifted, span);
  }

  const double total = row_mass(tile_max, tile_sum, tiles, sums.max);
  const bool finite = horizontal_sum(poison) == 0.0f && __builtin_isfinite(total);
  op.argmax[row_number] = argmax;
  op.row_max[row_number] = sums.max;
  op.row_sum[row_number] = finite ? total : NAN;
  op.entropy[row_number] =
      finite ? static_cast<float>(std::log(total) - sums.shifted / sums.mass) : NAN;
}

}  // namespace
}  // namespace dgemma
