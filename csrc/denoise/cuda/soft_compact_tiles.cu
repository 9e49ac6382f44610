// Compacts the needed vocabulary tiles of a request, those that any of its rows needs, into a list
// in increasing order. A block has a request.
#include "denoise/cuda/row_scan.h"
#include "denoise/cuda/soft_tiles.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Shared {
  double warps[kRowWarps];
};

__global__ void __launch_bounds__(kRowThreads) soft_compact_tiles(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.x;
  if (!is_in_round(p, request)) return;
  Shared& shared = device::shared_memory<Shared>();
  const uint32_t* const needed = p.needed + request * p.logits.tiles;
  int32_t* const list = p.list + request * p.logits.tiles;
  const TileRun run = tile_run(p.logits.tiles);
  int32_t mine = 0;
  for (int32_t tile = run.begin; tile < run.end; ++tile) mine += needed[tile] != 0;
  // Small whole numbers, exact in double.
  const RunningTotal counts = running_total(mine, shared.warps);
  int32_t at = static_cast<int32_t>(counts.before);
  for (int32_t tile = run.begin; tile < run.end; ++tile)
    if (needed[tile] != 0) list[at++] = tile;
  if (threadIdx.x == 0) p.count[request] = static_cast<int32_t>(counts.total);
}

}  // namespace

const char* launch_soft_compact_tiles(const SoftPlan& /*plan*/, const SoftPass& pass,
                                      void* stream) {
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(pass.logits.batch)),
                                     .threads = kRowThreads,
                                     .shared_bytes = sizeof(Shared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_compact_tiles, pass);
}

}  // namespace dgemma
