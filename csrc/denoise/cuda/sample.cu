// Inverse CDF in two levels: a block finds the tile by its mass, then a warp the entry inside it.
#include "denoise/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "denoise/cuda/row_scan.h"
#include "device/launch.h"
#include "device/philox.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Sample {
  Logits logits;
  const float* row_max;
  const double* row_sum;
  const float *tile_max, *tile_sum;
  const int64_t* seed;
  const int32_t *canvas_index, *step;
  const double* uniforms;
  int32_t* tokens;
};

struct Shared {
  double total[kRowWarps];
  double left;     // the part of the target that is inside the tile
  int32_t tile;    // the tile that holds the target
  uint32_t owner;  // the thread whose run holds it; kRowThreads where none does
  int32_t last;    // the last tile that has mass, -1 when none has any
};

// The first tile of this thread's run whose cumulative mass exceeds the target. Rounding may leave
// none; then the last that has mass, wholly.
DGEMMA_DEVICE void choose_tile(const float* tile_max, const float* tile_sum, float row_max,
                               TileRun run, double before, double target, Shared& shared) {
  shared.left = INFINITY;
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    const double mass = tile_mass(tile_max[tile], tile_sum[tile], row_max);
    if (!(mass > 0.0)) continue;
    shared.tile = tile;
    if (before + mass > target) {
      shared.left = target - before;
      return;
    }
    before += mass;
  }
}

// The first entry whose cumulative mass exceeds what is left, or the last that has any. One warp.
template <typename T>
DGEMMA_DEVICE int32_t choose_entry(const Sample& p, int64_t row, int32_t tile, float tile_max,
                                   float row_max, double left) {
  const Logits& logits = p.logits;
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t first = tile * kTile + lane * kLaneEntries;
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[row / logits.length]);
  const uint32_t usable = usable_entries(allowed_bits(logits.allowed, logits.vocabulary, row),
                                         logits.vocabulary, first);
  float raw[kLaneEntries];
  read_entries<T>(logits, row, first, usable, raw);
  const double factor = expf(tile_max - row_max);
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

template <typename T>
__global__ void __launch_bounds__(kRowThreads) sample_kernel(const Sample p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!is_active(logits.active, request)) return;
  Shared& shared = device::shared_memory<Shared>();
  const float* const tile_max = p.tile_max + row * logits.tiles;
  const float* const tile_sum = p.tile_sum + row * logits.tiles;
  const float row_max = p.row_max[row];
  if (threadIdx.x == 0) {
    shared.owner = kRowThreads;
    shared.last = -1;
  }

  const TileRun run = tile_run(logits.tiles);
  double mass = 0.0;
  int32_t last = -1;
  for (int32_t tile = run.begin; tile < run.end; ++tile) {
    const double of_tile = tile_mass(tile_max[tile], tile_sum[tile], row_max);
    mass += of_tile;
    if (of_tile > 0.0) last = tile;
  }
  const RunningTotal masses = running_total(mass, shared.total);
  // A row that is not finite has no distribution; its request ends with the update.
  const bool has_mass = p.row_sum[row] > 0.0;
  const double uniform =
      p.uniforms != nullptr
          ? p.uniforms[row]
          : draw_uniform(p.seed[request], p.canvas_index[request], p.step[request],
                         row % logits.length, DGEMMA_PURPOSE_SAMPLE);
  const double target = uniform * p.row_sum[row];
  // The first thread with mass that reaches beyond the target. Several may lie around it, as
  // running totals fall where they are rounded; then that is the one.
  const uint32_t reaching =
      __ballot_sync(device::kAllLanes, has_mass && mass > 0.0 && target < masses.after);
  last = __reduce_max_sync(device::kAllLanes, last);
  if (device::lane_index() == 0) {
    if (reaching != 0)
      atomicMin(&shared.owner, threadIdx.x + __ffs(static_cast<int>(reaching)) - 1);
    atomicMax(&shared.last, last);
  }
  __syncthreads();
  if (threadIdx.x == shared.owner)
    choose_tile(tile_max, tile_sum, row_max, run, masses.before, target, shared);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  int32_t tile = has_mass ? shared.last : -1;
  double left = INFINITY;
  if (shared.owner < kRowThreads) {
    tile = shared.tile;
    left = shared.left;
  }
  const int32_t token =
      tile < 0 ? -1 : choose_entry<T>(p, row, tile, tile_max[tile], row_max, left);
  if (threadIdx.x != 0) return;
  p.tokens[row] = token >= 0 ? token
                             : lowest_allowed(allowed_bits(logits.allowed, logits.vocabulary, row),
                                              logits.vocabulary);
}

}  // namespace

const char* launch_sample(const dgemma_sample& op, void* stream) {
  const Logits logits = make_logits(op.logits);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(
      shape, stream,
      op.logits.dtype == DGEMMA_BFLOAT16 ? sample_kernel<device::bfloat16> : sample_kernel<float>,
      Sample{logits, op.row_max, op.row_sum, op.tile_max, op.tile_sum, op.seed, op.canvas_index,
             op.step, op.uniforms, op.tokens});
}

}  // namespace dgemma
