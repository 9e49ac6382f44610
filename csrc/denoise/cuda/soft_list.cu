// The vocabulary tiles that any row of a request needs, in increasing order: a block has a request.
#include "denoise/cuda/row_scan.h"
#include "denoise/cuda/soft_weights.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Shared {
  double warps[kRowWarps];
};

__global__ void __launch_bounds__(kRowThreads) soft_list(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.x;
  if (!takes_part(p, request)) return;
  Shared& shared = device::shared_memory<Shared>();
  const uint32_t* const wanted = p.wanted + request * p.logits.tiles;
  int32_t* const list = p.list + request * p.logits.tiles;
  const TileRun run = tile_run(p.logits.tiles);
  int32_t mine = 0;
  for (int32_t tile = run.begin; tile < run.end; ++tile) mine += wanted[tile] != 0;
  // Small whole numbers, exact in double.
  const RunningTotal counts = running_total(mine, shared.warps);
  int32_t at = static_cast<int32_t>(counts.before);
  for (int32_t tile = run.begin; tile < run.end; ++tile)
    if (wanted[tile] != 0) list[at++] = tile;
  if (threadIdx.x == 0) p.count[request] = static_cast<int32_t>(counts.total);
}

}  // namespace

const char* launch_soft_list(const SoftPlan& /*plan*/, const SoftPass& pass, void* stream) {
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(pass.logits.batch)),
                                     .threads = kRowThreads,
                                     .shared_bytes = sizeof(Shared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_list, pass);
}

}  // namespace dgemma
