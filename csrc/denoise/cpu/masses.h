// Masses of a tile, relative to its own maximum in fp32, and of a row of tiles, in double and in
// the order of their indices: a row's result depends on the row alone.
#pragma once

#include <cmath>

#include "denoise/cpu/logits.h"

namespace dgemma {
namespace {

// Tiles whose shifted sums wait on the stack until they are brought to the row's maximum.
constexpr int64_t kSpanTiles = 512;

struct TileMasses {
  float max;
  float mass;     // sum of exp(z - max)
  float shifted;  // sum of exp(z - max)(z - max)
};

// The tile has an entry above -infinity.
inline TileMasses tile_masses(const TileLogits& tile) {
  const float reference = horizontal_max(tile.largest_z);
  TileSum mass_sum, shifted_sum;
  for (int i = 0; i < kTile; i += kLanes) {
    const Floats d = larger(load(tile.z + i) - reference, broadcast(kLeastExponent));
    const Floats e = exponential(d);
    mass_sum.add(i, e);
    shifted_sum.add_product(i, e, d);
  }
  return {reference, mass_sum.total(), shifted_sum.total()};
}

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

// The mass of all tiles relative to row_max.
inline double row_mass(const float* tile_max, const float* tile_sum, int64_t tiles, float row_max) {
  double total = 0.0;
  float factors[kFactors];
  for (int64_t j = 0; j < tiles; ++j) {
    if (j % kFactors == 0) tile_factors(tile_max + j, tiles - j, row_max, factors);
    total += static_cast<double>(tile_sum[j]) * factors[j % kFactors];
  }
  return total;
}

}  // namespace
}  // namespace dgemma
