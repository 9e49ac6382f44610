// The token of a row at a uniform, by the inverse CDF in two levels: a block finds the tile by its
// mass, then a warp the entry inside it.
#pragma once

#include "denoise/cuda/logits.h"
#include "denoise/cuda/row_scan.h"

namespace dgemma {
namespace {

// A row's logits with the statistics of its tiles.
struct RowOfTiles {
  const Logits& logits;
  int64_t row;
  const float *tile_max, *tile_sum;
  float row_max;
  double row_sum;
};

struct DrawScratch {
  double total[kRowWarps];
  double left;     // the part of the target that is inside the tile
  int32_t tile;    // the tile that holds the target
  uint32_t owner;  // the thread whose run holds it; kRowThreads where none does
  int32_t last;    // the last tile that has mass, -1 when none has any
};

// The first tile of this thread's run whose cumulative mass exceeds the target. Rounding may leave
// none; then the last that has mass, wholly.
DGEMMA_DEVICE void choose_tile(const RowOfTiles& p, TileRun run, double before, double target,
                               DrawScratch& scratch) {
  scratch.left = INFINITY;
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    const double mass = tile_mass(p.tile_max[tile], p.tile_sum[tile], p.row_max);
    if (!(mass > 0.0)) continue;
    scratch.tile = tile;
    if (before + mass > target) {
      scratch.left = target - before;
      return;
    }
    before += mass;
  }
}

// The first entry whose cumulative mass exceeds what is left, or the last that has any. One warp.
template <typename T, typename Usable>
DGEMMA_DEVICE int32_t choose_entry(const RowOfTiles& p, int32_t tile, double left,
                                   const Usable& usable_of) {
  const Logits& logits = p.logits;
  const float tile_max = p.tile_max[tile];
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t first = tile * kTile + lane * kLaneEntries;
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[p.row / logits.length]);
  const uint32_t usable = usable_of(first);
  float raw[kLaneEntries];
  read_entries<T>(logits, p.row, first, usable, raw);
  const double factor = expf(tile_max - p.row_max);
  double masses[kLaneEntries], of_lane = 0.0;
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i) {
    masses[i] =
        usable >> i & 1 ? static_cast<double>(expf(scale(raw[i]) - tile_max)) * factor : 0.0;
    of_lane += masses[i];
  }
  double cumulative = of_lane;
#pragma unroll
  for (int32_t by = 1; by < 32; by *= 2) {
    const double below = __shfl_up_sync(device::kAllLanes, cumulative, by);
    if (lane >= by) cumulative += below;
  }
  cumulative = __shfl_up_sync(device::kAllLanes, cumulative, 1);
  if (lane == 0) cumulative = 0.0;
  int32_t found = INT32_MAX, last = -1;
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i) {
    if (!(masses[i] > 0.0)) continue;
    last = first + i;
    cumulative += masses[i];
    if (cumulative > left) found = min(found, first + i);
  }
  found = __reduce_min_sync(device::kAllLanes, found);
  last = __reduce_max_sync(device::kAllLanes, last);
  return found != INT32_MAX ? found : last;
}

// A thread's part of a row.
struct RunMass {
  double mass;
  int32_t last;  // the last tile that has mass, -1 when none has any
};

DGEMMA_DEVICE RunMass run_mass(const RowOfTiles& p, TileRun run) {
  RunMass found = {0.0, -1};
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    const double of_tile = tile_mass(p.tile_max[tile], p.tile_sum[tile], p.row_max);
    found.mass += of_tile;
    if (of_tile > 0.0) found.last = tile;
  }
  return found;
}

// The token, in the first warp; -1 where no entry has mass. `usable_of` gives for a lane's first
// entry which of its four may be drawn. The whole block calls this.
template <typename T, typename Usable>
DGEMMA_DEVICE int32_t draw_token(const RowOfTiles& p, double uniform, DrawScratch& scratch,
                                 const Usable& usable_of) {
  if (threadIdx.x == 0) {
    scratch.owner = kRowThreads;
    scratch.last = -1;
  }
  const TileRun run = tile_run(p.logits.tiles);
  const RunMass own = run_mass(p, run);
  const RunningTotal masses = running_total(own.mass, scratch.total);
  // A row that is not finite has no distribution; its request ends with the update.
  const bool has_mass = p.row_sum > 0.0;
  const double target = uniform * p.row_sum;
  // The first thread with mass that reaches beyond the target. Several may lie around it, as
  // running totals fall where they are rounded; then that is the one.
  const uint32_t reaching =
      __ballot_sync(device::kAllLanes, has_mass && own.mass > 0.0 && target < masses.after);
  const int32_t last = __reduce_max_sync(device::kAllLanes, own.last);
  if (device::lane_index() == 0) {
    if (reaching != 0)
      atomicMin(&scratch.owner, threadIdx.x + __ffs(static_cast<int>(reaching)) - 1);
    atomicMax(&scratch.last, last);
  }
  __syncthreads();
  if (threadIdx.x == scratch.owner) choose_tile(p, run, masses.before, target, scratch);
  __syncthreads();
  if (threadIdx.x >= 32) return -1;
  int32_t tile = has_mass ? scratch.last : -1;
  double left = INFINITY;
  if (scratch.owner < kRowThreads) {
    tile = scratch.tile;
    left = scratch.left;
  }
  return tile < 0 ? -1 : choose_entry<T>(p, tile, left, usable_of);
}

}  // namespace
}  // namespace dgemma
