// What the head does with a finished tile: every warp takes rows of it, stores them and makes their
// statistics, a row at a time, four entries a lane.
#pragma once

#include "denoise/cuda_logits.h"
#include "denoise/head.h"

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

// One row of the tile by one warp.
DGEMMA_DEVICE void finish_row(const Head& p, const LogitScale& scale, int64_t row, int32_t tile,
                              const device::bfloat16* values) {
  const Logits& logits = p.logits;
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t first = tile * kTile + lane * kLaneEntries;
  const uint2 four = *reinterpret_cast<const uint2*>(values + lane * kLaneEntries);
  store_four(p.raw + row * logits.vocabulary, logits.vocabulary, first, four);
  const float raw[kLaneEntries] = {device::low_to_float(four.x), device::high_to_float(four.x),
                                   device::low_to_float(four.y), device::high_to_float(four.y)};
  const uint32_t usable = usable_entries(allowed_bits(logits.allowed, logits.vocabulary, row),
                                         logits.vocabulary, first);
  const TileStatistics statistics = tile_statistics(raw, usable, first, scale);
  if (lane != 0) return;
  const int64_t at = row * logits.tiles + tile;
  p.tile_max[at] = statistics.max;
  p.tile_sum[at] = statistics.sum;
  p.parts.shifted[at] = statistics.shifted;
  p.parts.best[at] = statistics.best;
  p.parts.index[at] = statistics.index;
}

}  // namespace
}  // namespace dgemma
