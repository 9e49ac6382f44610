// The schedule of the sm90 kernels: which rows and keys a block has, and where a tile of keys lies.
// The same code runs on the device, and on the host where a test walks over all blocks.
#pragma once

#include "block_attention/cuda/splits.h"
#include "common/ceil_divide.h"

namespace dgemma {

// Blocks that share what they load: neighbouring tiles of rows.
constexpr int32_t kAttentionCluster = 2;

// The tile of rows of block `block` of those of a request, key head and split, which may be one
// past the last; -1 where the whole cluster has none. Causal attention begins with the last, which
// see most.
DGEMMA_HOST_DEVICE int32_t row_tile_of_block(int32_t block, int32_t row_tiles, bool causal) {
  const int32_t clusters = ceil_divide(row_tiles, kAttentionCluster);
  const int32_t cluster = block / kAttentionCluster;
  if (cluster >= clusters) return -1;
  return (causal ? clusters - 1 - cluster : cluster) * kAttentionCluster +
         block % kAttentionCluster;
}

// The tiles of `keys` positions that a split has of first .. end - 1. There may be none, and the
// last may reach past the end.
struct KeyTiles {
  int32_t first, tiles;
};

DGEMMA_HOST_DEVICE KeyTiles keys_of_split(int32_t first, int32_t end, int32_t keys, int32_t splits,
                                          int32_t split) {
  const int32_t tiles = ceil_divide(end - first, keys);
  const int32_t each = ceil_divide(tiles, splits);
  const int32_t begin = split * each < tiles ? split * each : tiles;
  return {first + begin * keys, each < tiles - begin ? each : tiles - begin};
}

// A tile of keys from position `first` on as one run of rows: of the cache's slot, or of the block.
enum class KeySource { kPrefix, kBlock, kScattered };

struct KeyRun {
  KeySource source;
  int32_t row;
};

// end: after the last position that any row sees. A run has keys alone that may be read.
DGEMMA_HOST_DEVICE KeyRun find_run(int32_t first, int32_t keys, int32_t end, int32_t prefix,
                                   int32_t capacity) {
  if (first + keys <= prefix) {
    const int32_t row = first % capacity;
    if (row + keys <= capacity) return {KeySource::kPrefix, row};
  } else if (first >= prefix && first + keys <= end) {
    return {KeySource::kBlock, first - prefix};
  }
  return {KeySource::kScattered, 0};
}

// Where runs of rows end. A tile with one of these positions inside, or that reaches past the last,
// is scattered: what find_run says, without its division for every tile.
struct RunEnds {
  int32_t ring, prefix, end;
};

// Of keys in pages: what any tile reaches past.
DGEMMA_HOST_DEVICE RunEnds all_scattered() { return {0, 0, INT32_MIN}; }

// Of the prefix no more than the capacity is stored, so the ring ends inside it at most once.
DGEMMA_HOST_DEVICE RunEnds find_run_ends(int32_t end, int32_t prefix, int32_t capacity) {
  return {prefix > 0 ? (prefix - 1) / capacity * capacity : 0, prefix, end};
}

// Without branches, since it stands between products.
DGEMMA_HOST_DEVICE bool is_scattered(const RunEnds& ends, int32_t first, int32_t keys) {
  const auto is_inside = [=](int32_t position) {
    return static_cast<uint32_t>(position - first - 1) < static_cast<uint32_t>(keys - 1);
  };
  return is_inside(ends.ring) | is_inside(ends.prefix) | (first + keys > ends.end);
}

}  // namespace dgemma
