// Inverse CDF in two levels: the tile by its mass, then the entry inside it.
#pragma once

#include "denoise/cpu/logits.h"
#include "device/philox.h"

namespace dgemma {
namespace {

struct TileChoice {
  int64_t tile;  // -1 when no tile has mass
  float factor;  // exp(tile_max - row_max)
  double left;   // the part of the target that is inside the tile
};

// The first tile whose cumulative mass exceeds the target. Rounding may leave the target at or
// beyond the whole mass; then the last tile that has any, wholly.
inline TileChoice choose_tile(const float* tile_max, const float* tile_sum, int64_t tiles,
                              float row_max, double target) {
  TileChoice choice = {-1, 0.0f, INFINITY};
  double before = 0.0;
  float factors[kFactors];
  for (int64_t j = 0; j < tiles; ++j) {
    if (j % kFactors == 0) tile_factors(tile_max + j, tiles - j, row_max, factors);
    const double tile_mass = static_cast<double>(tile_sum[j]) * factors[j % kFactors];
    if (!(tile_mass > 0.0)) continue;
    choice.tile = j;
    choice.factor = factors[j % kFactors];
    if (before + tile_mass > target) {
      choice.left = target - before;
      return choice;
    }
    before += tile_mass;
  }
  return choice;
}

// The first entry of the chosen tile whose cumulative mass exceeds what is left, or the last that
// has any.
inline int choose_entry(const TileLogits& tile, const TileChoice& choice, float tile_max) {
  alignas(64) float masses[kTile];
  for (int i = 0; i < kTile; i += kLanes)
    store(masses + i, mass(load(tile.z + i), broadcast(tile_max)));
  int chosen = 0;
  double cumulative = 0.0;
  for (int i = 0; i < kTile; ++i) {
    if (!(masses[i] > 0.0f)) continue;
    chosen = i;
    cumulative += static_cast<double>(masses[i]) * choice.factor;
    if (cumulative > choice.left) break;
  }
  return chosen;
}

template <typename T>
void sample_row(const dgemma_sample& op, int64_t row_number) {
  if (!is_active(op.logits, row_number)) return;
  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  const int64_t request = row_number / op.logits.length;
  const double uniform =
      op.uniforms != nullptr
          ? op.uniforms[row_number]
          : draw_uniform(op.seed[request], op.canvas_index[request], op.step[request],
                         row_number % op.logits.length, DGEMMA_PURPOSE_SAMPLE);
  const int64_t tiles = tiles_of(row.vocabulary);
  const float* const tile_max = op.tile_max + row_number * tiles;
  const double row_sum = op.row_sum[row_number];
  TileChoice choice = {-1, 0.0f, 0.0};
  if (row_sum > 0.0)
    choice = choose_tile(tile_max, op.tile_sum + row_number * tiles, tiles, op.row_max[row_number],
                         uniform * row_sum);
  // A row that is not finite has no distribution; its request ends with the update.
  if (choice.tile < 0) {
    op.tokens[row_number] = nth_allowed(row.allowed, row.vocabulary, 0);
    return;
  }
  TileLogits tile;
  read_tile(row, choice.tile, &tile);
  op.tokens[row_number] =
      static_cast<int32_t>(choice.tile * kTile + choose_entry(tile, choice, tile_max[choice.tile]));
}

}  // namespace
}  // namespace dgemma
