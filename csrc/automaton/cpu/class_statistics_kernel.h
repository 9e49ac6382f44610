// A row's statistics by class. The row is read twice: exponents are taken from a class's own
// maximum, so that a class far below the row's maximum keeps its mass.
#pragma once

#include "automaton/cpu/kernels.h"
#include "denoise/cpu/logits.h"

namespace dgemma {
namespace {

template <typename T>
void class_statistics_row(const dgemma_class_statistics& op, int64_t row_number) {
  const int64_t request = row_number / op.logits.length;
  if (!is_active(op.logits, row_number) || !has_automaton(op.descriptor, request)) return;
  const Automaton automaton = automaton_of(op.arena, op.descriptor, request);
  const int32_t* const class_of = automaton.class_of_token;
  const int64_t first_class = row_number * op.most_classes;
  float* const largest = op.class_max + first_class;
  int32_t* const argmax = op.class_argmax + first_class;
  double* const mass = op.class_mass + first_class;
  double* const shifted = op.class_shifted + first_class;
  for (int64_t k = 0; k < op.most_classes; ++k) {
    largest[k] = -INFINITY;
    argmax[k] = -1;
    mass[k] = shifted[k] = 0.0;
  }
  if (op.pinned != nullptr && op.pinned[row_number] != 0) {
    const int32_t token = op.canvas[row_number];
    largest[class_of[token]] = 0.0f;
    argmax[class_of[token]] = token;
    mass[class_of[token]] = 1.0;
    return;
  }

  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  const int64_t tiles = tiles_of(row.vocabulary);
  TileLogits tile;
  for (int64_t j = 0; j < tiles; ++j) {
    if (tile_is_empty(row.allowed, row.vocabulary, j)) continue;
    read_tile(row, j, &tile);
    const int64_t first = j * kTile;
    const int64_t end = row.vocabulary - first < kTile ? row.vocabulary - first : kTile;
    for (int64_t i = 0; i < end; ++i) {
      const float z = tile.z[i];
      const int32_t k = class_of[first + i];
      if (z < largest[k] || z == -INFINITY) continue;
      // The soft cap may give different raw logits the same z.
      if (z > largest[k] || to_float(row.raw[first + i]) > to_float(row.raw[argmax[k]]))
        argmax[k] = static_cast<int32_t>(first + i);
      largest[k] = z;
    }
  }
  alignas(64) float below[kTile], e[kTile];
  for (int64_t j = 0; j < tiles; ++j) {
    if (tile_is_empty(row.allowed, row.vocabulary, j)) continue;
    read_tile(row, j, &tile);
    const int64_t first = j * kTile;
    const int64_t end = row.vocabulary - first < kTile ? row.vocabulary - first : kTile;
    for (int i = 0; i < kTile; ++i) {
      const bool present = i < end && tile.z[i] > -INFINITY;
      below[i] = present ? tile.z[i] - largest[class_of[first + i]] : -INFINITY;
    }
    for (int i = 0; i < kTile; i += kLanes) {
      const Floats d = larger(load(below + i), broadcast(kLeastExponent));
      store(e + i, exponential(d));
    }
    for (int64_t i = 0; i < end; ++i) {
      if (!(below[i] > kLeastExponent)) continue;
      const int32_t k = class_of[first + i];
      mass[k] += e[i];
      shifted[k] += static_cast<double>(e[i]) * below[i];
    }
  }
}

}  // namespace
}  // namespace dgemma
