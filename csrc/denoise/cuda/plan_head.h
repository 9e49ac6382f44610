// The launch plan and tile scheduler of the head's product on sm_90. The same code finds a work
// tile by its number on the device and on the host, so that a test can walk all of them.
//
// A work tile is a pair of vocabulary tiles by a tile of a request's rows, for a cluster of two
// blocks, one tile each. Work tiles of one pair lie side by side, so that all requests and row
// tiles find its rows of the embedding in the L2. Requests that are not active have no work tiles:
// they are known on the device alone, and the rest is divided evenly whatever they are.
#pragma once

#include <cstdint>
#include <iosfwd>

#include "common/host_device.h"
#include "denoise/cuda/kernels.h"

namespace dgemma {

// Two consumer warpgroups, one producer warp, three warps that finish tiles. With a fourth
// warpgroup a thread would begin with 128 registers, which cannot hold 128 accumulators.
constexpr int32_t kHeadThreads = 384;

struct HeadPlan {
  int32_t row_tile;    // rows of a work tile: 64, 128 or 256
  int32_t row_tiles;   // of a request
  int32_t tile_pairs;  // of the vocabulary
  int32_t blocks;      // two to a cluster; cluster c takes the work tiles c, c + blocks / 2, ...
};

struct HeadWorkTile {
  int32_t tile_pair;
  int32_t request;  // among the active ones
  int32_t row_tile;
};

DGEMMA_HOST_DEVICE int64_t count_work_tiles(const HeadPlan& plan, int32_t active_requests) {
  return static_cast<int64_t>(plan.tile_pairs) * plan.row_tiles * active_requests;
}

DGEMMA_HOST_DEVICE HeadWorkTile find_work_tile(const HeadPlan& plan, int32_t active_requests,
                                               int64_t index) {
  const int64_t rest = index / plan.row_tiles;
  return {static_cast<int32_t>(rest / active_requests),
          static_cast<int32_t>(rest % active_requests),
          static_cast<int32_t>(index % plan.row_tiles)};
}

// A canvas of at most 64 or 128 rows takes the smaller tile, so bits do not depend on it: a row's
// sums are those of its own column of wgmma.
int32_t vocabulary_row_tile(int32_t length);

HeadPlan make_head_plan(const Logits& logits, int32_t multiprocessors);
void print(const HeadPlan& plan, std::ostream& out);

}  // namespace dgemma
