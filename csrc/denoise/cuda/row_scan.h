// A block goes over the tiles of a row like this: every thread has a run of consecutive tiles, and
// running totals go from thread to thread in order. The statistics and the sampling both use it, so
// that they come to the same double.
#pragma once

#include "common/ceil_divide.h"
#include "device/language.h"
#include "device/warp.h"

namespace dgemma {
namespace {

constexpr int32_t kRowThreads = 256;
constexpr int32_t kRowWarps = kRowThreads / 32;

// A thread's tiles: [begin, end).
struct TileRun {
  int32_t begin, end;
};

DGEMMA_DEVICE TileRun tile_run(int32_t tiles) {
  const int32_t each = ceil_divide(tiles, kRowThreads);
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * each, tiles);
  return {begin, min(begin + each, tiles)};
}

// A thread's `after` is the very `before` of the next, so that a number below the total lies
// between the two of some thread. Of several, where they are rounded: sums of more threads may be
// smaller by a unit in the last place, as each is added up in an order of its own.
struct RunningTotal {
  double before;  // of the threads before this one
  double after;   // and this one
  double total;   // of all
};

// The whole block calls this; `warps` is scratch memory.
DGEMMA_DEVICE RunningTotal running_total(double value, double (&warps)[kRowWarps]) {
  const uint32_t lane = device::lane_index(), warp = device::warp_index();
  double up_to = value;
#pragma unroll
  for (uint32_t by = 1; by < 32; by *= 2) {
    const double below = __shfl_up_sync(device::kAllLanes, up_to, by);
    if (lane >= by) up_to += below;
  }
  if (lane == 31) warps[warp] = up_to;
  const double before_lane = __shfl_up_sync(device::kAllLanes, up_to, 1);
  __syncthreads();
  RunningTotal result = {lane == 0 ? 0.0 : before_lane, up_to, 0.0};
  for (uint32_t w = 0; w < kRowWarps; ++w) {
    if (w == warp) {
      result.before += result.total;
      result.after += result.total;
    }
    result.total += warps[w];
  }
  __syncthreads();
  return result;
}

}  // namespace
}  // namespace dgemma
