// Reduces the statistics of a row's tiles to the row's. A block has a row, a thread a run of tiles.
#include "denoise/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "denoise/cuda/row_scan.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Rows {
  Logits logits;
  const float *tile_max, *tile_sum;
  TileParts parts;
  int32_t* argmax;
  float *entropy, *row_max;
  double* row_sum;
};

struct Shared {
  double total[kRowWarps];
  double shifted[kRowWarps];
  float max[kRowWarps];
  float best[kRowWarps];
  int32_t index[kRowWarps];
};

struct Best {
  float value;
  int32_t index;
};

// The largest, of equals the lowest index.
DGEMMA_DEVICE Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__global__ void __launch_bounds__(kRowThreads) finish_statistics(const Rows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x;
  if (!is_active(logits.active, row / logits.length)) return;
  Shared& shared = device::shared_memory<Shared>();
  const uint32_t lane = device::lane_index(), warp = device::warp_index();
  const TileRun run = tile_run(logits.tiles);
  const float* const tile_max = p.tile_max + row * logits.tiles;
  const float* const tile_sum = p.tile_sum + row * logits.tiles;

  float largest = -INFINITY;
  Best best = {-INFINITY, INT32_MAX};
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    largest = fmaxf(largest, tile_max[tile]);
    const int64_t at = row * logits.tiles + tile;
    best = better(best, {p.parts.best[at], p.parts.index[at]});
  }
  largest = warp_max(largest);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    best = better(best, {__shfl_xor_sync(device::kAllLanes, best.value, lanes),
                         __shfl_xor_sync(device::kAllLanes, best.index, lanes)});
  if (lane == 0) {
    shared.max[warp] = largest;
    shared.best[warp] = best.value;
    shared.index[warp] = best.index;
  }
  __syncthreads();
  for (uint32_t w = 0; w < kRowWarps; ++w) {
    largest = fmaxf(largest, shared.max[w]);
    best = better(best, {shared.best[w], shared.index[w]});
  }

  // Tiles brought to the row's maximum: sum of exp(z - max) (z - max), and the mass as sampling
  // counts it. A tile without mass adds nothing.
  double mass = 0.0, shifted = 0.0;
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    const float part = p.parts.shifted[row * logits.tiles + tile];
    if (!(tile_sum[tile] > 0.0f) && part == part) continue;
    mass += tile_mass(tile_max[tile], tile_sum[tile], largest);
    const double change = static_cast<double>(tile_max[tile]) - largest;
    shifted += exp(change) * (part + change * tile_sum[tile]);
  }
  const RunningTotal masses = running_total(mass, shared.total);
  const RunningTotal shifts = running_total(shifted, shared.shifted);
  if (threadIdx.x != 0) return;
  const bool finite = fabs(shifts.total) < INFINITY && masses.total > 0.0;
  p.argmax[row] =
      best.index < logits.vocabulary
          ? best.index
          : lowest_allowed(allowed_bits(logits.allowed, logits.vocabulary, row), logits.vocabulary);
  p.row_max[row] = largest;
  p.row_sum[row] = finite ? masses.total : static_cast<double>(NAN);
  p.entropy[row] =
      finite ? static_cast<float>(log(masses.total) - shifts.total / masses.total) : NAN;
}

}  // namespace

const char* launch_finish_statistics(const dgemma_vocabulary_statistics& op, const TileParts& parts,
                                     void* stream) {
  const Logits logits = make_logits(op.logits);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(
      shape, stream, finish_statistics,
      Rows{logits, op.tile_max, op.tile_sum, parts, op.argmax, op.entropy, op.row_max, op.row_sum});
}

}  // namespace dgemma
