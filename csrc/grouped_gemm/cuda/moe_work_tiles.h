// A work tile of the experts' CUDA kernels, and how it is found by its number. The same code runs
// on device and host, so that a test can walk every work tile.
//
// An expert with n pairs has ceil(n / token_tile) token tiles, and each of its weight tiles meets
// each of them once. Work tiles are numbered expert by expert, then weight tile by weight tile, the
// token tiles of one weight tile side by side: blocks that run at the same time then share a weight
// tile in L2. An expert without pairs has no work tile.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dgemma {

// Written by sort_pairs.cu. A pair is one slot of one token, token * top_k + slot.
struct MoeTables {
  const int32_t* first;         // [experts + 1]: expert e has the sorted pairs first[e] and on
  const int32_t* tiles_before;  // [experts + 1]: token tiles of the experts before e
  const int32_t* pair;          // [first[experts]]: pairs by expert, ascending within one
  int32_t experts;
};

struct MoeWorkTile {
  int32_t expert;
  int32_t weight_tile;
  int32_t first;        // sorted position of the tile's first pair
  int32_t rows;         // pairs in the tile, 1 to token_tile
  int32_t token_tiles;  // of the expert
};

DGEMMA_HOST_DEVICE int32_t count_work_tiles(const MoeTables& tables, int32_t weight_tiles) {
  return tables.tiles_before[tables.experts] * weight_tiles;
}

// Work tile number `index`, below count_work_tiles.
DGEMMA_HOST_DEVICE MoeWorkTile find_work_tile(const MoeTables& tables, int32_t weight_tiles,
                                              int32_t token_tile, int32_t index) {
  // The last expert with no more token tiles before it than this; experts without any come before
  // it.
  const int32_t tile = index / weight_tiles;
  int32_t expert = 0;
  for (int32_t end = tables.experts; end - expert > 1;) {
    const int32_t middle = (expert + end) / 2;
    if (tables.tiles_before[middle] <= tile)
      expert = middle;
    else
      end = middle;
  }
  const int32_t before = tables.tiles_before[expert];
  const int32_t tiles = tables.tiles_before[expert + 1] - before;
  const int32_t rest = index - before * weight_tiles;
  const int32_t first = tables.first[expert] + rest % tiles * token_tile;
  const int32_t left = tables.first[expert + 1] - first;
  return {expert, rest / tiles, first, left < token_tile ? left : token_tile, tiles};
}

}  // namespace dgemma
