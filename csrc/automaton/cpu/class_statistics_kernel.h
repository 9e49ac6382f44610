// A row's statistics by class: those of `vocabulary_statistics` over the tokens of each.
#pragma once

#include "automaton/cpu/class_tile.h"
#include "automaton/cpu/kernels.h"

namespace dgemma {
namespace {

struct ClassStatistics {
  ShiftedSums sums;
  int32_t argmax = -1;
};

template <typename T>
ClassStatistics class_statistics(const LogitRow<T>& row, const int32_t* tokens, int64_t count) {
  ClassStatistics found;
  float best = -INFINITY;
  float tile_max[kSpanTiles], tile_sum[kSpanTiles], tile_shifted[kSpanTiles];
  int64_t span = 0;
  ClassTile tile;
  for (int64_t first = 0; first < count; first += kTile) {
    read_tokens(row, tokens + first, count - first < kTile ? count - first : kTile, &tile);
    if (tile.is_empty()) continue;
    const TileMasses masses = tile_masses(tile.logits);
    tile_max[span] = masses.max;
    tile_sum[span] = masses.mass;
    tile_shifted[span] = masses.shifted;
    const float largest = horizontal_max(tile.logits.largest_raw);
    if (largest > best) {
      best = largest;
      int at = 0;
      while (tile.raw[at] != largest) ++at;
      found.argmax = tokens[first + at];
    }
    if (++span == kSpanTiles) {
      found.sums.add(tile_max, tile_sum, tile_shifted, span);
      span = 0;
    }
  }
  found.sums.add(tile_max, tile_sum, tile_shifted, span);
  return found;
}

template <typename T>
void class_statistics_row(const dgemma_class_statistics& op, int64_t row_number) {
  const int64_t request = row_number / op.logits.length;
  if (!is_active(op.logits, row_number) || !has_automaton(op.descriptor, request)) return;
  const Automaton automaton = automaton_of(op.arena, op.descriptor, request);
  const int64_t first_class = row_number * op.most_classes;
  const auto write = [&](int64_t k, const ClassStatistics& found) {
    op.class_max[first_class + k] = found.sums.max;
    op.class_argmax[first_class + k] = found.argmax;
    op.class_mass[first_class + k] = found.sums.mass;
    op.class_shifted[first_class + k] = found.sums.shifted;
  };
  const bool pinned = op.pinned != nullptr && op.pinned[row_number] != 0;
  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  for (int64_t k = 0; k < op.most_classes; ++k) {
    if (k >= automaton.classes || pinned) {
      write(k, {});
      continue;
    }
    const int32_t first = automaton.token_begin[k];
    write(k, class_statistics(row, automaton.tokens + first, automaton.token_begin[k + 1] - first));
  }
  if (pinned) {
    const int32_t token = op.canvas[row_number];
    write(automaton.class_of_token[token], {{.max = 0.0f, .mass = 1.0}, token});
  }
}

}  // namespace
}  // namespace dgemma
