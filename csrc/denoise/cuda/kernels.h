// The arguments of this family's CUDA kernels, and the declarations of their launches. All pointers
// are to the device's memory.
#pragma once

#include <cstdint>

#include "common/ceil_divide.h"
#include "dgemma/denoise.h"

namespace dgemma {

// The end of a step keeps a canvas's entropies in shared memory, twice: 32 KB.
constexpr int32_t kLongestCanvas = 4096;

struct AllowedTokens {
  const uint32_t* mask;  // [rows, ceil(vocabulary / 32)] or null
  const int32_t* row_index;
};

struct Logits {
  const void* raw;           // [batch, length, vocabulary]
  const float* temperature;  // [batch]
  const uint8_t* active;     // [batch] or null
  AllowedTokens allowed;
  float softcap;
  int32_t batch, length, vocabulary, tiles;
};

inline Logits make_logits(const dgemma_logits& op) {
  const int64_t tiles = ceil_divide(op.vocabulary, DGEMMA_VOCABULARY_TILE);
  return {op.raw,
          op.temperature,
          op.active,
          {reinterpret_cast<const uint32_t*>(op.allowed.mask), op.allowed.row_index},
          op.softcap,
          static_cast<int32_t>(op.batch),
          static_cast<int32_t>(op.length),
          static_cast<int32_t>(op.vocabulary),
          static_cast<int32_t>(tiles)};
}

// The statistics of a row's tiles that are kept only until the row is summed up, beside the
// tile_max and tile_sum that stay: [batch, length, tiles] each. See TileStatistics.
struct TileParts {
  float* shifted;
  float* best;
  int32_t* index;
};

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.

// Writes tile_max, tile_sum and the parts from stored logits.
const char* launch_tile_statistics(const dgemma_vocabulary_statistics& op, const TileParts& parts,
                                   void* stream);
// Reduces those to the statistics of the rows.
const char* launch_finish_statistics(const dgemma_vocabulary_statistics& op, const TileParts& parts,
                                     void* stream);
const char* launch_merge_shards(const dgemma_merge_vocabulary_shards& op, void* stream);
const char* launch_sample(const dgemma_sample& op, void* stream);
const char* launch_noise(const dgemma_noise& op, void* stream);
const char* launch_update_canvas(const dgemma_update_canvas& op, void* stream);

}  // namespace dgemma
