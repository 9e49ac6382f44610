// A row's statistics by class, in one pass over its raw logits.
//
// Most tokens are of one class, which is found by a vote over some of them: its entries of a tile
// are taken together, as the statistics of the whole row are. The others are few, and are taken one
// by one but for their exponentials. Sums are relative to a class's own maximum, so that a class
// far below the row's maximum keeps its mass; where that rises, they are brought to the new one.
#pragma once

#include <cmath>

#include "automaton/cpu/kernels.h"
#include "denoise/cpu/logits.h"

namespace dgemma {
namespace {

// The class that most of the tokens looked at have, where one has more than half (Boyer and Moore).
inline int32_t common_class(const int32_t* class_of_token, int64_t vocabulary) {
  constexpr int64_t kVotes = 1024;
  const int64_t stride = vocabulary < kVotes ? 1 : vocabulary / kVotes;
  int32_t candidate = 0;
  int64_t lead = 0;
  for (int64_t token = 0; token < vocabulary; token += stride) {
    if (lead == 0) candidate = class_of_token[token];
    lead += class_of_token[token] == candidate ? 1 : -1;
  }
  return candidate;
}

// A bit for each of kLanes values that is not `one`.
inline uint32_t lanes_that_differ(const int32_t* values, int32_t one) {
#if defined(__AVX512F__)
  return _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(values), _mm512_set1_epi32(one));
#elif defined(__AVX2__)
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i same = _mm256_cmpeq_epi32(loaded, _mm256_set1_epi32(one));
  return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) & 0xffu;
#else
  return values[0] != one ? 1u : 0u;
#endif
}

// One row's part of the outputs.
struct ClassSums {
  float* largest;
  int32_t* argmax;
  double* mass;
  double* shifted;

  // z is not below the class's maximum.
  void raise(int32_t k, float z, int32_t token) {
    if (mass[k] > 0.0 && z > largest[k]) {
      const double change = static_cast<double>(largest[k]) - z;
      const double factor = std::exp(change);
      shifted[k] = factor * (shifted[k] + change * mass[k]);
      mass[k] *= factor;
    }
    largest[k] = z;
    argmax[k] = token;
  }
};

template <typename T>
struct ClassTile {
  const LogitRow<T>& row;
  const float* z;
  const int32_t* classes;  // of the tile's tokens
  int64_t first;

  float raw(int64_t token) const { return to_float(row.raw[token]); }

  // Whether a token with `z` takes the place of the class's best. The soft cap may give different
  // raw logits the same z.
  bool is_better(const ClassSums& sums, int32_t k, int i) const {
    if (z[i] != sums.largest[k]) return z[i] > sums.largest[k];
    return sums.argmax[k] < 0 || raw(first + i) > raw(sums.argmax[k]);
  }

  void add_common(int32_t common, ClassSums* sums) const {
    alignas(64) float own[kTile];
    Floats largest = broadcast(-INFINITY);
    for (int i = 0; i < kTile; i += kLanes) {
      Ints k;
      std::memcpy(&k, classes + i, sizeof k);
      const Floats v = k == broadcast(common) ? load(z + i) : broadcast(-INFINITY);
      largest = larger(v, largest);
      store(own + i, v);
    }
    const float reference = horizontal_max(largest);
    if (reference == -INFINITY) return;
    TileSum mass_sum, shifted_sum;
    for (int i = 0; i < kTile; i += kLanes) {
      const Floats d = larger(load(own + i) - reference, broadcast(kLeastExponent));
      const Floats e = exponential(d);
      mass_sum.add(i, e);
      shifted_sum.add_product(i, e, d);
    }
    if (reference >= sums->largest[common])
      for (int i = 0; i < kTile; ++i)
        if (own[i] == reference && is_better(*sums, common, i))
          sums->raise(common, reference, static_cast<int32_t>(first + i));
    const double change = static_cast<double>(reference) - sums->largest[common];
    const double factor = std::exp(change);
    const double tile_mass = mass_sum.total();
    sums->mass[common] += factor * tile_mass;
    sums->shifted[common] += factor * (shifted_sum.total() + change * tile_mass);
  }

  void add_others(int32_t common, ClassSums* sums) const {
    int places[kTile];
    int count = 0;
    for (int i = 0; i < kTile; i += kLanes) {
      uint32_t others = lanes_that_differ(classes + i, common);
      for (; others != 0; others &= others - 1) {
        const int at = i + __builtin_ctz(others);
        if (z[at] == -INFINITY) continue;
        places[count++] = at;
        const int32_t k = classes[at];
        if (is_better(*sums, k, at)) sums->raise(k, z[at], static_cast<int32_t>(first + at));
      }
    }
    alignas(64) float below[kTile + kLanes], e[kTile + kLanes];
    for (int j = 0; j < count; ++j) below[j] = z[places[j]] - sums->largest[classes[places[j]]];
    for (int j = count; j < count + kLanes; ++j) below[j] = kLeastExponent;
    for (int j = 0; j < count; j += kLanes)
      store(e + j, exponential(larger(load(below + j), broadcast(kLeastExponent))));
    for (int j = 0; j < count; ++j) {
      const int32_t k = classes[places[j]];
      sums->mass[k] += e[j];
      // A term that is 0 times minus infinity in no case: below is finite.
      sums->shifted[k] += static_cast<double>(e[j]) * below[j];
    }
  }
};

template <typename T>
void class_statistics_row(const dgemma_class_statistics& op, int64_t row_number) {
  const int64_t request = row_number / op.logits.length;
  if (!is_active(op.logits, row_number) || !has_automaton(op.descriptor, request)) return;
  const Automaton automaton = automaton_of(op.arena, op.descriptor, request);
  const int32_t* const class_of = automaton.class_of_token;
  const int64_t first_class = row_number * op.most_classes;
  ClassSums sums = {op.class_max + first_class, op.class_argmax + first_class,
                    op.class_mass + first_class, op.class_shifted + first_class};
  for (int64_t k = 0; k < op.most_classes; ++k) {
    sums.largest[k] = -INFINITY;
    sums.argmax[k] = -1;
    sums.mass[k] = sums.shifted[k] = 0.0;
  }
  if (op.pinned != nullptr && op.pinned[row_number] != 0) {
    const int32_t token = op.canvas[row_number];
    sums.raise(class_of[token], 0.0f, token);
    sums.mass[class_of[token]] = 1.0;
    return;
  }

  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  const int32_t common = common_class(class_of, row.vocabulary);
  int32_t last_classes[kTile];  // of a tile that ends beyond the vocabulary, where z is -infinity
  TileLogits tile;
  for (int64_t j = 0; j < tiles_of(row.vocabulary); ++j) {
    if (tile_is_empty(row.allowed, row.vocabulary, j)) continue;
    read_tile(row, j, &tile);
    const int64_t first = j * kTile;
    const int32_t* classes = class_of + first;
    if (first + kTile > row.vocabulary) {
      for (int i = 0; i < kTile; ++i)
        last_classes[i] = first + i < row.vocabulary ? classes[i] : common;
      classes = last_classes;
    }
    const ClassTile<T> part = {row, tile.z, classes, first};
    part.add_common(common, &sums);
    part.add_others(common, &sums);
  }
}

}  // namespace
}  // namespace dgemma
