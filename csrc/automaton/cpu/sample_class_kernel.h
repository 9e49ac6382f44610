// The token inside a row's chosen class, by inverse CDF as `sample` has it.
#pragma once

#include "automaton/cpu/class_tile.h"
#include "automaton/cpu/kernels.h"
#include "denoise/cpu/sample_kernel.h"

namespace dgemma {
namespace {

// tile_max, tile_sum: room for the tiles of the vocabulary.
template <typename T>
void sample_class_row(const dgemma_sample_class& op, int64_t row_number, float* tile_max,
                      float* tile_sum) {
  const int64_t request = row_number / op.logits.length;
  const bool pinned = op.pinned != nullptr && op.pinned[row_number] != 0;
  if (pinned || !is_active(op.logits, row_number) || !has_automaton(op.descriptor, request) ||
      op.matches[request] == 0)
    return;
  const Automaton automaton = automaton_of(op.arena, op.descriptor, request);
  const int32_t chosen = op.chosen_class[row_number];
  // Of a request whose entropies are not finite no class was chosen.
  if (chosen < 0 || chosen >= automaton.classes) return;
  const int32_t* const tokens = automaton.tokens + automaton.token_begin[chosen];
  const int64_t count = automaton.token_begin[chosen + 1] - automaton.token_begin[chosen];
  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  const auto read = [&](int64_t j, ClassTile* tile) {
    const int64_t first = j * kTile;
    read_tokens(row, tokens + first, count - first < kTile ? count - first : kTile, tile);
  };
  float row_max = -INFINITY;
  ClassTile tile;
  for (int64_t j = 0; j < tiles_of(count); ++j) {
    read(j, &tile);
    const TileMasses masses =
        tile.is_empty() ? TileMasses{-INFINITY, 0.0f, 0.0f} : tile_masses(tile.logits);
    tile_max[j] = masses.max;
    tile_sum[j] = masses.mass;
    if (masses.max > row_max) row_max = masses.max;
  }
  const double mass = row_mass(tile_max, tile_sum, tiles_of(count), row_max);
  if (!(mass > 0.0)) return;
  const TileChoice choice =
      choose_tile(tile_max, tile_sum, tiles_of(count), row_max, op.remainder[row_number] * mass);
  read(choice.tile, &tile);
  op.tokens[row_number] =
      tokens[choice.tile * kTile + choose_entry(tile.logits, choice, tile_max[choice.tile])];
}

}  // namespace
}  // namespace dgemma
