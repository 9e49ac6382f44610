// A work tile of a dense projection: a weight tile by a token tile, and one segment of k or all of
// them. The same code runs on device and host, so that a test can walk every work tile.
#pragma once

#include "device/language.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"

namespace dgemma {

struct DenseWorkTile {
  int32_t weight_tile;
  int32_t first;  // row of input
  int32_t rows;   // 1 to token_tile
  int32_t segment, segments;
};

struct DenseTileScheduler {
  int32_t rows, weight_tiles, token_tiles, k_steps, segments;
  bool apart;

  DGEMMA_HOST_DEVICE int32_t segments_at_once() const { return apart ? 1 : segments; }
  DGEMMA_HOST_DEVICE int32_t count() const {
    return weight_tiles * token_tiles * (segments / segments_at_once());
  }
  // Token tiles of one weight tile side by side, so that they share it in L2.
  DGEMMA_HOST_DEVICE DenseWorkTile find(int32_t token_tile, int32_t index) const {
    const int32_t first = index % token_tiles * token_tile, rest = index / token_tiles;
    const int32_t left = rows - first;
    return {rest % weight_tiles, first, left < token_tile ? left : token_tile, rest / weight_tiles,
            segments_at_once()};
  }
  // Calls visit(work_tile, new_rows) for every blocks-th work tile. new_rows: the rows of input are
  // not known to be those of the work tile before.
  template <typename Visit>
  DGEMMA_DEVICE void for_each(int32_t token_tile, int32_t block, int32_t blocks,
                              Visit visit) const {
    for (int32_t index = block; index < count(); index += blocks)
      visit(find(token_tile, index), true);
  }
  // The first step of a segment; of the one past the last, k_steps.
  DGEMMA_HOST_DEVICE int32_t begin(int32_t segment) const { return segment * k_steps / segments; }
  DGEMMA_HOST_DEVICE int32_t steps(int32_t segment) const {
    return begin(segment + 1) - begin(segment);
  }
  DGEMMA_HOST_DEVICE int32_t first_step(const DenseWorkTile& work_tile) const {
    return begin(work_tile.segment);
  }
  DGEMMA_HOST_DEVICE int32_t steps(const DenseWorkTile& work_tile) const {
    return begin(work_tile.segment + work_tile.segments) - begin(work_tile.segment);
  }
};

}  // namespace dgemma
