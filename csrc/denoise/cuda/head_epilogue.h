// The epilogue of the head: every warp takes rows of a finished tile, stores them and makes their
// statistics.
#pragma once

#include "denoise/cuda/head.h"
#include "denoise/cuda/logits.h"

namespace dgemma {
namespace {

// A tile of products in shared memory, rounded. 16 bytes beyond a row keep the pairs that mma's
// threads write, and the rows that warps read, on different banks.
template <int kRows>
struct HeadTile {
  static constexpr int32_t kStride = kTile + 8;
  alignas(16) device::bfloat16 value[kRows][kStride];
};

DGEMMA_DEVICE void store_four(device::bfloat16* to, int32_t vocabulary, int32_t first, uint2 four) {
  if (vocabulary % kLaneEntries == 0) {
    if (first < vocabulary) *reinterpret_cast<uint2*>(to + first) = four;
    return;
  }
  const uint32_t pairs[2] = {four.x, four.y};
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i)
    if (first + i < vocabulary)
      to[first + i] = {static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)))};
}

// Rows of the tile by one warp, kLanes lanes to each: `rows` of them at most, of which the first is
// `row` of the logits and begins at `values`.
template <int kLanes, int kRows>
DGEMMA_DEVICE void finish_rows(const Head& p, const LogitScale& scale, int64_t row, int32_t rows,
                               int32_t tile,
                               const device::bfloat16 (*values)[HeadTile<kRows>::kStride]) {
  using Row = RowOfTile<kLanes>;
  const Logits& logits = p.logits;
  const int32_t lane = static_cast<int32_t>(device::lane_index()) % kLanes;
  const int32_t mine = static_cast<int32_t>(device::lane_index()) / kLanes;
  const bool there = mine < rows;
  const int32_t first = tile * kTile + lane * kLaneEntries;
  row += mine;
  const uint32_t* const bits =
      there ? allowed_bits(logits.allowed, logits.vocabulary, row) : nullptr;
  const uint32_t usable = there ? Row::usable(bits, logits.vocabulary, first) : 0;
  float raw[Row::kEntries];
#pragma unroll
  for (int i = 0; i < Row::kEntries; i += kLaneEntries) {
    const int32_t offset = Row::offset(i);
    const uint2 four =
        *reinterpret_cast<const uint2*>(&values[there ? mine : 0][lane * kLaneEntries + offset]);
    raw[i] = device::low_to_float(four.x);
    raw[i + 1] = device::high_to_float(four.x);
    raw[i + 2] = device::low_to_float(four.y);
    raw[i + 3] = device::high_to_float(four.y);
    if (there) store_four(p.raw + row * logits.vocabulary, logits.vocabulary, first + offset, four);
  }
  const TileStatistics statistics = tile_statistics(raw, usable, first, scale);
  if (lane != 0 || !there) return;
  const int64_t at = row * logits.tiles + tile;
  p.tile_max[at] = statistics.max;
  p.tile_sum[at] = statistics.sum;
  p.parts.shifted[at] = statistics.shifted;
  p.parts.best[at] = statistics.best;
  p.parts.index[at] = statistics.index;
}

}  // namespace
}  // namespace dgemma
