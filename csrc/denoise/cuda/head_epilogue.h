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

// Stores the first `count` of four entries, at any address.
DGEMMA_DEVICE void store_some(device::bfloat16* to, int32_t count, uint2 four) {
  const uint32_t pairs[2] = {four.x, four.y};
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i)
    if (i < count) to[i] = {static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)))};
}

// kGroups times 32 / kLanes rows of the tile by one warp, kLanes lanes to each: `rows` of them at
// most, of which the first is `row` of the logits and begins at `values`.
template <int kLanes, int kGroups, int kRows>
DGEMMA_DEVICE void finish_rows(const Head& p, const LogitScale& scale, int64_t row, int32_t rows,
                               int32_t tile,
                               const device::bfloat16 (*values)[HeadTile<kRows>::kStride]) {
  using Row = RowOfTile<kLanes>;
  const Logits& logits = p.logits;
  const int32_t lane = static_cast<int32_t>(device::lane_index()) % kLanes;
  const int32_t first = tile * kTile + lane * kLaneEntries;
  int32_t mine[kGroups];  // the lane's rows
  uint2 four[kGroups][Row::kQuads];
  float raw[kGroups * Row::kEntries];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    mine[g] = (g * 32 + static_cast<int32_t>(device::lane_index())) / kLanes;
#pragma unroll
    for (int quad = 0; quad < Row::kQuads; ++quad) {
      const int32_t offset = Row::offset(quad * kLaneEntries);
      four[g][quad] = *reinterpret_cast<const uint2*>(
          &values[mine[g] < rows ? mine[g] : 0][lane * kLaneEntries + offset]);
      float* const of_quad = raw + g * Row::kEntries + quad * kLaneEntries;
      of_quad[0] = device::low_to_float(four[g][quad].x);
      of_quad[1] = device::high_to_float(four[g][quad].x);
      of_quad[2] = device::low_to_float(four[g][quad].y);
      of_quad[3] = device::high_to_float(four[g][quad].y);
    }
  }
  uint32_t usable[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const bool there = mine[g] < rows;
    const uint32_t* const bits =
        there ? allowed_bits(logits.allowed, logits.vocabulary, row + mine[g]) : nullptr;
    usable[g] = there ? Row::usable(bits, logits.vocabulary, first) : 0;
  }
  // One test for all: a branch for each four entries would keep their stores apart.
  const bool words = logits.vocabulary % kLaneEntries == 0;
  const auto for_each_four = [&](auto store) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int quad = 0; quad < Row::kQuads; ++quad) {
        const int32_t entry = first + Row::offset(quad * kLaneEntries);
        if (mine[g] < rows && entry < logits.vocabulary)
          store(p.raw + (row + mine[g]) * logits.vocabulary + entry, entry, four[g][quad]);
      }
  };
  if (words)
    for_each_four([](device::bfloat16* to, int32_t /*entry*/, uint2 entries) {
      *reinterpret_cast<uint2*>(to) = entries;
    });
  else
    for_each_four([&](device::bfloat16* to, int32_t entry, uint2 entries) {
      store_some(to, logits.vocabulary - entry, entries);
    });
  TileStatistics statistics[kGroups];
  tile_statistics<Row::kEntries>(raw, usable, first, scale, statistics);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (lane != 0 || mine[g] >= rows) continue;
    const int64_t at = (row + mine[g]) * logits.tiles + tile;
    p.tile_max[at] = statistics[g].max;
    p.tile_sum[at] = statistics[g].sum;
    p.parts.shifted[at] = statistics[g].shifted;
    p.parts.best[at] = statistics[g].best;
    p.parts.index[at] = statistics[g].index;
  }
}

}  // namespace
}  // namespace dgemma
