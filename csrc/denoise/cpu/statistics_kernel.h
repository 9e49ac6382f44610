// Statistics of one row in one pass over its raw logits.
//
// Inside a tile everything is fp32 and relative to the tile's maximum; across tiles it is double in
// index order. So a row's result depends on the row alone.
#pragma once

#include <cmath>

#include "denoise/cpu/logits.h"

namespace dgemma {
namespace {

// Tiles whose shifted sums wait on the stack until they are brought to the row's maximum.
constexpr int64_t kSpanTiles = 512;

// sum of exp(z - max) and of exp(z - max)(z - max) over the tiles so far.
struct ShiftedSums {
  float max = -INFINITY;
  double mass = 0.0;
  double shifted = 0.0;

  void raise(float new_max) {
    if (!(new_max > max)) return;
    if (mass > 0.0) {
      const double change = static_cast<double>(max) - new_max;
      const double factor = std::exp(change);
      shifted = factor * (shifted + change * mass);
      mass *= factor;
    }
    max = new_max;
  }

  void add(const float* tile_max, const float* tile_sum, const float* tile_shifted, int64_t tiles) {
    for (int64_t j = 0; j < tiles; ++j) raise(tile_max[j]);
    float factors[kFactors];
    for (int64_t j = 0; j < tiles; ++j) {
      if (j % kFactors == 0) tile_factors(tile_max + j, tiles - j, max, factors);
      if (!(tile_sum[j] > 0.0f)) continue;
      const double factor = factors[j % kFactors];
      const double change = static_cast<double>(tile_max[j]) - max;
      mass += factor * tile_sum[j];
      shifted += factor * (tile_shifted[j] + change * tile_sum[j]);
    }
  }
};

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
      const float reference = horizontal_max(tile.largest_z);
      TileSum mass_sum, shifted_sum;
      for (int i = 0; i < kTile; i += kLanes) {
        const Floats d = larger(load(tile.z + i) - reference, broadcast(kLeastExponent));
        const Floats e = exponential(d);
        mass_sum.add(i, e);
        shifted_sum.add_product(i, e, d);
      }
      tile_max[j] = reference;
      tile_sum[j] = mass_sum.total();
      tile_shifted[j % kSpanTiles] = shifted_sum.total();
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

  double total = 0.0;
  float factors[kFactors];
  for (int64_t j = 0; j < tiles; ++j) {
    if (j % kFactors == 0) tile_factors(tile_max + j, tiles - j, sums.max, factors);
    total += static_cast<double>(tile_sum[j]) * factors[j % kFactors];
  }
  const bool finite = horizontal_sum(poison) == 0.0f && __builtin_isfinite(total);
  op.argmax[row_number] = argmax;
  op.row_max[row_number] = sums.max;
  op.row_sum[row_number] = finite ? total : NAN;
  op.entropy[row_number] =
      finite ? static_cast<float>(std::log(total) - sums.shifted / sums.mass) : NAN;
}

}  // namespace
}  // namespace dgemma
