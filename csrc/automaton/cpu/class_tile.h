// A class's tokens are read in the order of their ids, 128 at a time, as the vocabulary is in its
// tiles: a class of all tokens has the bits of the vocabulary.
#pragma once

#include "automaton/automaton.h"
#include "denoise/cpu/masses.h"

namespace dgemma {
namespace {

struct ClassTile {
  alignas(64) float raw[kTile];  // -infinity where there is no token, or it is not allowed
  TileLogits logits;

  bool is_empty() const { return horizontal_max(logits.largest_z) == -INFINITY; }
};

// `count` tokens, at most a tile.
template <typename T>
void read_tokens(const LogitRow<T>& row, const int32_t* tokens, int64_t count, ClassTile* out) {
  begin_tile(&out->logits);
  if (count == kTile && row.allowed == nullptr) {
    for (int i = 0; i < kTile; ++i) out->raw[i] = to_float(row.raw[tokens[i]]);
    if (row.scale.capped)
      read_whole_tile<float, true>(out->raw, row.scale, &out->logits);
    else
      read_whole_tile<float, false>(out->raw, row.scale, &out->logits);
    return;
  }
  bool present[kTile];
  for (int i = 0; i < kTile; ++i) {
    present[i] = i < count && is_allowed(row.allowed, tokens[i]);
    out->raw[i] = present[i] ? to_float(row.raw[tokens[i]]) : 0.0f;
  }
  read_present(out->raw, present, row.scale, &out->logits);
}

}  // namespace
}  // namespace dgemma
