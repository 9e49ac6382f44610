// The soft embedding of one row: its probabilities, and the sparse way.
//
// A row's probabilities need its own normaliser: rounding z to bf16 moves every exponent by up to
// 2^-8 |z|, so those of the statistics would not make them sum to one.
#pragma once

#include "denoise/cpu/kernels.h"
#include "denoise/cpu/logits.h"
#include "denoise/skipped_tiles.h"

namespace dgemma {
namespace {

// More entries than this and the row is done densely. At the model's width a dense row costs about
// 23 million cycles when it shares the pass with others, an entry 300 from the cache and 1,800 from
// memory.
constexpr int kSparseEntries = 4096;
// Thresholds on exp(z - row_max) below which entries may be skipped: 2^-9, 2^-12, ... 2^-30. The
// largest that keeps within the budget is taken.
constexpr int kThresholds = 8;
constexpr float kLargestThreshold = 0x1p-9f;
constexpr float kThresholdStep = 0x1p-3f;
// Fractions of the tolerance that are budgeted for whole tiles that are skipped, and for these and
// entries together. The sum's norm is guessed from the probabilities, so a margin is left.
constexpr float kTileShare = 0.125f;
constexpr float kSkippedShare = 0.25f;

// exp(dtype(z) - dtype(row_max)) of a tile.
template <typename T>
inline void tile_weights(const LogitRow<T>& row, int64_t tile, float row_max, TileLogits* out) {
  read_tile(row, tile, out);
  for (int i = 0; i < kTile; i += kLanes)
    store(out->z + i, mass(rounded_to<T>(load(out->z + i)), broadcast(row_max)));
}

template <typename T>
inline float rounded(float x) {
  return to_float(round_to<T>(x));
}

inline bool is_pinned(const dgemma_soft_embedding& op, int64_t row) {
  return op.pinned != nullptr && op.pinned[row] != 0;
}

// The sum over all entries of exp(dtype(z) - dtype(row_max)): tiles in fp32, across them in double.
template <typename T>
double weight_sum(const LogitRow<T>& row, float row_max) {
  double total = 0.0;
  TileLogits tile;
  for (int64_t j = 0; j < tiles_of(row.vocabulary); ++j) {
    if (tile_is_empty(row.allowed, row.vocabulary, j)) continue;
    tile_weights(row, j, row_max, &tile);
    TileSum sum;
    for (int i = 0; i < kTile; i += kLanes) sum.add(i, load(tile.z + i));
    total += sum.total();
  }
  return total;
}

// Bounds on the weights of a row's tiles (skipped_tiles.h), kFactors of them at a time.
template <typename T>
class TileBounds {
 public:
  TileBounds(const dgemma_soft_embedding& op, int64_t row, float row_max)
      : tiles(tiles_of(op.logits.vocabulary)),
        tile_max_(op.tile_max + row * tiles),
        tile_sum_(op.tile_sum + row * tiles),
        row_max_(row_max) {}

  // Tiles are asked for in increasing order.
  float of(int64_t tile) {
    if (tile % kFactors == 0) make(tile);
    return bound_[tile % kFactors];
  }

  // The limit up to which tiles are skipped, so that their bounds stay within the budget.
  TileLimit find_limit(float budget) {
    const float least = budget / static_cast<float>(tiles);
    Floats below[kTileLimits];
    for (int i = 0; i < kTileLimits; ++i) below[i] = broadcast(0.0f);
    for (int64_t tile = 0; tile < tiles; tile += kFactors) {
      make(tile);
      for (int lane = 0; lane < kFactors; lane += kLanes) {
        const Floats bound = load(bound_ + lane);
        float limit = least;
        for (int i = 0; i < kTileLimits; ++i, limit *= kTileLimitStep)
          below[i] += bound <= limit ? bound : broadcast(0.0f);
      }
    }
    float totals[kTileLimits];
    for (int i = 0; i < kTileLimits; ++i) totals[i] = horizontal_sum(below[i]);
    return choose_tile_limit(totals, least, budget);
  }

  const int64_t tiles;

 private:
  // e^88 is the largest exponential that is a number on every instruction set. A tile without
  // entries has the exponent -infinity + infinity, and a sum of 0.
  void make(int64_t first) {
    const float roundoff = sizeof(T) == 2 ? kBfloat16Roundoff : 0.0f;
    alignas(64) float top[kFactors], sum[kFactors];
    for (int i = 0; i < kFactors; ++i) {
      top[i] = first + i < tiles ? tile_max_[first + i] : -INFINITY;
      sum[i] = first + i < tiles ? tile_sum_[first + i] : 0.0f;
    }
    for (int i = 0; i < kFactors; i += kLanes) {
      const Floats z = load(top + i), size = (Floats)((Words)z & 0x7fffffffu);
      const Floats exponent = fmadd(size, broadcast(roundoff), z) - row_max_;
      const Floats within = smaller(larger(exponent, broadcast(kLeastExponent)), broadcast(88.0f));
      store(bound_ + i, exponential(within) * (load(sum + i) * kTileMargin));
    }
  }

  const float *tile_max_, *tile_sum_;
  float row_max_;
  alignas(64) float bound_[kFactors];
};

// The result of one pass over a row's tiles: what skipping entries would cost. The pass ends where
// the row has too many entries above every threshold; a flat row's does after a few tiles.
struct SparsePlan {
  TileLimit tiles;      // those that are not read, and a bound on their mass
  double sum;           // of the entries of the tiles that are, and of the others by their bound
  float threshold;      // entries with a weight below it are skipped; 0: the row is done densely
  double entries_left;  // their mass
};

template <typename T>
SparsePlan plan_sparse(const LogitRow<T>& row, TileBounds<T>& bounds, float row_max,
                       float tolerance) {
  SparsePlan plan = {};
  plan.tiles = bounds.find_limit(kTileShare * tolerance);
  Floats below[kThresholds] = {};
  double below_total[kThresholds] = {}, squares = 0.0;
  Ints above = {};
  TileLogits tile;
  for (int64_t j = 0; j < bounds.tiles; ++j) {
    if (!(bounds.of(j) > plan.tiles.limit)) continue;
    tile_weights(row, j, row_max, &tile);
    TileSum sum;
    Floats square = broadcast(0.0f);
    for (int t = 0; t < kThresholds; ++t) below[t] = broadcast(0.0f);
    for (int i = 0; i < kTile; i += kLanes) {
      const Floats e = load(tile.z + i);
      sum.add(i, e);
      square = fmadd(e, e, square);
      above -= e >= kLargestThreshold;
      float threshold = kLargestThreshold;
      for (int t = 0; t < kThresholds; ++t, threshold *= kThresholdStep)
        below[t] += e < threshold ? e : broadcast(0.0f);
    }
    plan.sum += sum.total();
    squares += horizontal_sum(square);
    for (int t = 0; t < kThresholds; ++t) below_total[t] += horizontal_sum(below[t]);
    int entries = 0;
    for (int lane = 0; lane < kLanes; ++lane) entries += above[lane];
    if (entries > kSparseEntries) return plan;
  }
  plan.sum += plan.tiles.share_of_sum();
  // Rows of the embedding that are nearly orthogonal give a sum of norm sqrt(squares) / sum.
  const double budget =
      kSkippedShare * tolerance * std::sqrt(squares) - static_cast<double>(plan.tiles.skipped);
  plan.threshold = kLargestThreshold;
  for (int t = 0; t < kThresholds; ++t, plan.threshold *= kThresholdStep) {
    plan.entries_left = below_total[t];
    if (plan.entries_left <= budget) return plan;
  }
  plan.threshold = 0.0f;
  plan.entries_left = 0.0;
  return plan;
}

// sum += p[0] * E[token[0]] + ... + p[3] * E[token[3]]; unused places have p = 0 and any token.
template <typename T>
void add_four_rows(const T* embedding, int64_t hidden, const int64_t* tokens, const float* p,
                   float* sum) {
  const T* const e0 = embedding + tokens[0] * hidden;
  const T* const e1 = embedding + tokens[1] * hidden;
  const T* const e2 = embedding + tokens[2] * hidden;
  const T* const e3 = embedding + tokens[3] * hidden;
  const Floats p0 = broadcast(p[0]), p1 = broadcast(p[1]);
  const Floats p2 = broadcast(p[2]), p3 = broadcast(p[3]);
  int64_t c = 0;
  for (; c + kLanes <= hidden; c += kLanes) {
    Floats s = fmadd(p0, load(e0 + c), load(sum + c));
    s = fmadd(p1, load(e1 + c), s);
    s = fmadd(p2, load(e2 + c), s);
    store(sum + c, fmadd(p3, load(e3 + c), s));
  }
  for (; c < hidden; ++c)
    sum[c] += p[0] * to_float(e0[c]) + p[1] * to_float(e1[c]) + p[2] * to_float(e2[c]) +
              p[3] * to_float(e3[c]);
}

// The entries of a row that are not skipped. None is added up before all are known to be few.
struct SparseEntries {
  int count = 0;
  int32_t tokens[kSparseEntries];
  float p[kSparseEntries];

  // False where there are too many.
  bool add(int64_t token, float probability) {
    if (count == kSparseEntries) return false;
    tokens[count] = static_cast<int32_t>(token);
    p[count++] = probability;
    return true;
  }

  // sum += p[0] * E[tokens[0]] + ..., four at a time.
  template <typename T>
  void add_up(const T* embedding, int64_t hidden, float* sum) const {
    for (int i = 0; i < count; i += 4) {
      int64_t four[4];
      float probabilities[4];
      for (int k = 0; k < 4; ++k) {
        four[k] = tokens[i + k < count ? i + k : i];
        probabilities[k] = i + k < count ? p[i + k] : 0.0f;
      }
      add_four_rows(embedding, hidden, four, probabilities, sum);
    }
  }
};

inline double norm(const float* values, int64_t count) {
  double squares = 0.0;
  for (int64_t c = 0; c < count; ++c) squares += static_cast<double>(values[c]) * values[c];
  return std::sqrt(squares);
}

// Fills the row's sum from the entries that matter. False when there are too many, or when the
// skipped mass may change the result by more than the tolerance.
template <typename T>
bool sum_sparsely(const SoftEmbeddingWork& work, const LogitRow<T>& row, int64_t row_number,
                  float row_max) {
  const dgemma_soft_embedding& op = *work.op;
  TileBounds<T> bounds(op, row_number, row_max);
  const SparsePlan plan = plan_sparse(row, bounds, row_max, op.tolerance);
  if (plan.threshold == 0.0f) return false;
  const float inverse_sum = static_cast<float>(1.0 / plan.sum);
  SparseEntries entries;
  TileLogits tile;
  for (int64_t j = 0; j < bounds.tiles; ++j) {
    if (!(bounds.of(j) > plan.tiles.limit)) continue;
    tile_weights(row, j, row_max, &tile);
    for (int i = 0; i < kTile; ++i) {
      if (tile.z[i] < plan.threshold) continue;
      if (!entries.add(j * kTile + i, rounded<T>(tile.z[i] * inverse_sum))) return false;
    }
  }
  float* const sum = work.sums + row_number * work.padded_hidden;
  entries.add_up(static_cast<const T*>(op.embedding), op.hidden_size, sum);
  const double skipped_mass = kRoundingMargin * (plan.tiles.skipped + plan.entries_left) / plan.sum;
  // The tiles that were not read may be more or less of the normaliser, by as much at most.
  const double length = norm(sum, op.hidden_size);
  return skipped_mass * (op.max_embedding_norm + length) <= op.tolerance * length;
}

template <typename T>
void write_row(const SoftEmbeddingWork& work, int64_t row) {
  const dgemma_soft_embedding& op = *work.op;
  T* const output = static_cast<T*>(op.output) + row * op.hidden_size;
  const float* const sum = work.sums + row * work.padded_hidden;
  const float scale = rounded<T>(op.embedding_scale);
  for (int64_t c = 0; c < op.hidden_size; ++c) {
    if (is_pinned(op, row))
      output[c] = round_to<T>(0.0f);
    else
      output[c] = round_to<T>(rounded<T>(sum[c]) * scale);
  }
}

// The first pass over a row: pinned rows are written, rows that can be are summed sparsely and
// written, for the others the dense product is prepared.
template <typename T>
void soft_row(const SoftEmbeddingWork& work, int64_t row_number) {
  const dgemma_soft_embedding& op = *work.op;
  SoftEmbeddingRow& state = work.rows[row_number];
  state = {};
  if (!is_active(op.logits, row_number)) return;
  if (is_pinned(op, row_number)) return write_row<T>(work, row_number);
  const LogitRow<T> row = logit_row<T>(op.logits, row_number);
  float* const sum = work.sums + row_number * work.padded_hidden;
  for (int64_t c = 0; c < work.padded_hidden; ++c) sum[c] = 0.0f;
  // A row that is not finite has no distribution.
  if (!(op.row_sum[row_number] > 0.0)) {
    for (int64_t c = 0; c < op.hidden_size; ++c) sum[c] = NAN;
    return write_row<T>(work, row_number);
  }
  state.row_max = rounded<T>(op.row_max[row_number]);
  if (op.tolerance > 0.0f && sum_sparsely(work, row, row_number, state.row_max))
    return write_row<T>(work, row_number);
  for (int64_t c = 0; c < work.padded_hidden; ++c) sum[c] = 0.0f;
  state.inverse_sum = static_cast<float>(1.0 / weight_sum(row, state.row_max));
  state.needs_dense = 1;
}

}  // namespace
}  // namespace dgemma
