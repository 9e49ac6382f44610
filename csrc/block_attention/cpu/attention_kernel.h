// Attention of one work tile: a blocked online softmax (Milakov and Gimelshein 2018; Dao et al.
// 2022). The keys that the work tile's rows see are walked in tiles of kKeyTile; per tile
//
//   scores = query x key     p = exp(scale * scores - maximum)     accumulator += p x value
//
// with the running maximum, sum and accumulator of each row in fp32. Queries of all heads that
// share a key head are rows of one product, so a tile of keys and values is rearranged once for
// them all. With bf16 dot products p is rounded to bf16 for the last product, not for the sum.
#pragma once

#include <cstdint>
#include <cstring>

#include "block_attention/cpu/attention.h"
#include "block_attention/cpu/multiply_kernel.h"
#include "block_attention/cpu/visible_keys.h"
#include "cpu/vector.h"

namespace dgemma {
namespace {

#if defined(__AVX512BF16__)
template <typename T>
struct WordOf {
  using Type = Single<T>;
};
template <>
struct WordOf<bfloat16> {
  using Type = Pair;
};
#else
template <typename T>
struct WordOf {
  using Type = Single<T>;
};
#endif

// Keys or values of one key head of one request, by position: in a ring of rows and the block
// behind it, or in pages.
template <typename T>
struct Positions {
  const T* stored;  // row 0 of the slot, or of page 0
  const T* block;   // row 0 of the block
  int64_t prefix_length;
  int64_t capacity;
  const int32_t* page_table;
  int64_t page_size;
  int64_t page_stride;
  int64_t row_stride;

  // Those of `count` positions from `first` on. In place of positions before `least`, which no row
  // sees and which may not be stored, stands `least`: their probabilities are zero.
  void rows(int64_t first, int64_t count, int64_t least, const T** out) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = first + i < least ? least : first + i;
      out[i] = page_size > 0 ? in_pages(position) : in_slot_or_block(position);
    }
  }

 private:
  const T* in_pages(int64_t position) const {
    return stored + page_table[position / page_size] * page_stride +
           position % page_size * row_stride;
  }
  const T* in_slot_or_block(int64_t position) const {
    return position < prefix_length ? stored + position % capacity * row_stride
                                    : block + (position - prefix_length) * row_stride;
  }
};

template <typename T>
Positions<T> positions_of(const AttentionCall& call, const AttentionWorkTile& work_tile,
                          const KeyStorage& storage) {
  const AttentionCall::Request& request = work_tile.request;
  const int64_t head = work_tile.key_head * storage.head_stride;
  return {static_cast<const T*>(storage.stored) +
              request.slot * call.capacity * storage.row_stride + head,
          storage.block != nullptr
              ? static_cast<const T*>(storage.block) + request.first_row * storage.row_stride + head
              : nullptr,
          request.prefix,
          call.capacity,
          request.page_table,
          call.page_size,
          storage.page_stride,
          storage.row_stride};
}

// Element offset of a row of the work tile in query and output.
inline int64_t row_offset(const AttentionCall& call, const AttentionWorkTile& work_tile,
                          int64_t row) {
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t index = work_tile.first_row + row;
  const int64_t head = work_tile.key_head * group + index % group;
  return ((work_tile.request.first_row + index / group) * call.query_heads + head) * call.head_dim;
}

// Scores of one row become probabilities relative to the new maximum, in place, as words. Only
// columns begin .. end - 1 are seen by the row; the others up to `width`, a multiple of kLanes, get
// zero. Returns the factor that brings what was summed so far to the new maximum.
template <typename Word>
float softmax_row(float* scores, int64_t begin, int64_t end, int64_t width, float scale,
                  float* maximum, float* sum) {
  const Ints lane = lane_index();
  const Floats lowest = broadcast(-__builtin_inff());
  const auto seen = [&](int64_t j) {
    const Ints index = lane + static_cast<int32_t>(j);
    return (index >= static_cast<int32_t>(begin)) & (index < static_cast<int32_t>(end));
  };
  const auto whole = [&](int64_t j) { return j >= begin && j + kLanes <= end; };

  Floats highest = lowest;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats s = load(scores + j) * scale;
    highest = max(highest, whole(j) ? s : (seen(j) ? s : lowest));
  }
  const float before = *maximum;
  const float row_maximum = dgemma::maximum(highest);
  const float after = row_maximum > before ? row_maximum : before;
  const float factor = after == before ? 1.0f : exp(broadcast(before - after))[0];

  Floats row_sum = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats p = exp(load(scores + j) * scale - after);
    if (!whole(j)) p = seen(j) ? p : Floats{};
    row_sum += p;
    Word::store_probabilities(scores, j, p);
  }
  *maximum = after;
  *sum = *sum * factor + dgemma::sum(row_sum);
  return factor;
}

template <typename T>
void attend(const AttentionCall& call, const AttentionWorkTile& work_tile,
            const AttentionScratch& scratch) {
  using Word = typename WordOf<T>::Type;
  const int64_t head_dim = call.head_dim;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t rows = work_tile.rows;
  const int64_t padded_rows = round_up(rows, kTileRows);
  const int64_t query_steps = round_up(round_up(head_dim, Word::kValues) / Word::kValues, kLanes);
  const int64_t accumulator_stride = round_up(head_dim, kPanelColumns);
  const T* query = static_cast<const T*>(call.query);
  uint32_t* query_words = static_cast<uint32_t*>(scratch.query);
  uint32_t* panels = static_cast<uint32_t*>(scratch.panels);
  float* maximum = scratch.row_state;
  float* sum = scratch.row_state + kWorkTileRows;
  float* factor = scratch.row_state + 2 * kWorkTileRows;
  int64_t* begin = scratch.ranges;
  int64_t* end = scratch.ranges + kWorkTileRows;

  PositionRange seen = {INT64_MAX, 0};
  for (int64_t r = 0; r < padded_rows; ++r) {
    uint32_t* words = query_words + r * query_steps;
    maximum[r] = -__builtin_inff();
    sum[r] = 0.0f;
    factor[r] = 1.0f;
    if (r >= rows) {  // rows that only fill the last register tile
      std::memset(words, 0, static_cast<size_t>(query_steps) * sizeof *words);
      continue;
    }
    const T* from = query + row_offset(call, work_tile, r);
    for (int64_t step = 0; step < query_steps; step += kLanes) {
      const int64_t left = head_dim - step * Word::kValues;
      const Words loaded = Word::load_row(from, step, left);
      std::memcpy(words + step, &loaded, sizeof loaded);
    }
    const PositionRange range =
        visible_keys(call.window, work_tile.request, (work_tile.first_row + r) / group);
    begin[r] = range.first;
    end[r] = range.end;
    if (range.first < seen.first) seen.first = range.first;
    if (range.end > seen.end) seen.end = range.end;
  }
  std::memset(scratch.accumulator, 0,
              static_cast<size_t>(padded_rows * accumulator_stride) * sizeof(float));

  const Positions<T> keys = positions_of<T>(call, work_tile, call.keys);
  const Positions<T> values = positions_of<T>(call, work_tile, call.values);
  const T* tile_rows[kKeyTile];
  // Where tiles begin decides in which order a row sums. For encoding they begin at multiples of
  // kKeyTile, so that a position's bits do not depend on the piece that it is encoded in. A canvas
  // sees the same positions in every row.
  const int64_t first_tile =
      work_tile.request.causal ? seen.first / kKeyTile * kKeyTile : seen.first;
  for (int64_t tile = first_tile; tile < seen.end; tile += kKeyTile) {
    const int64_t count = seen.end - tile < kKeyTile ? seen.end - tile : kKeyTile;
    keys.rows(tile, count, seen.first, tile_rows);
    pack_rows_as_columns<Word>(tile_rows, count, head_dim, query_steps, panels);
    multiply<Word, Held::kDrop>(query_words, query_steps, panels, query_steps, query_steps,
                                padded_rows, count, scratch.scores, kKeyTile, factor);

    const int64_t width = round_up(count, kLanes > 2 ? kLanes : 2);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = begin[r] > tile ? begin[r] - tile : 0;
      const int64_t last = end[r] - tile < count ? end[r] - tile : count;
      factor[r] = softmax_row<Word>(scratch.scores + r * kKeyTile, first, last, width, call.scale,
                                    &maximum[r], &sum[r]);
    }

    constexpr int64_t value_steps = kKeyTile / Word::kValues;
    values.rows(tile, count, seen.first, tile_rows);
    pack_rows_as_steps<Word>(tile_rows, count, head_dim, value_steps, panels);
    multiply<Word, Held::kTimesFactorAndAdd>(
        reinterpret_cast<const uint32_t*>(scratch.scores), kKeyTile, panels, value_steps,
        round_up(count, 2) / Word::kValues, padded_rows, head_dim, scratch.accumulator,
        accumulator_stride, factor);
  }

  T* output = static_cast<T*>(call.output);
  for (int64_t r = 0; r < rows; ++r) {
    T* to = output + row_offset(call, work_tile, r);
    const float* from = scratch.accumulator + r * accumulator_stride;
    for (int64_t j = 0; j < head_dim; j += kLanes) {
      const Floats result = load(from + j) / sum[r];
      if (head_dim - j >= kLanes)
        store(to + j, result);
      else
        store_partial(to + j, result, head_dim - j);
    }
  }
}

}  // namespace
}  // namespace dgemma
