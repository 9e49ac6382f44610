// Selects the vocabulary tiles that each row needs, writes their z rounded to bfloat16 and the
// row's normaliser, and bounds the mass of the tiles that are skipped, which are not read. A block
// has a row, a warp four tiles at a time.
#include "denoise/cuda/row_scan.h"
#include "denoise/cuda/soft_tiles.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

constexpr int32_t kWorkers = kRowWarps * kTilesAtOnce;

struct Shared {
  float below[kTileLimits][kRowWarps];
  double sum[kWorkers];
};

// The limit up to which a row's tiles are skipped. Every thread of the block calls this and gets
// the same. A dense row skips only tiles without any mass.
DGEMMA_DEVICE TileLimit find_limit(const SoftPass& p, int64_t row, float row_max, Shared& shared) {
  if (p.dense || p.tolerance == 0.0f) return {0.0f, 0.0f};
  const float budget = kTileShare * p.tolerance;
  const float least = budget / static_cast<float>(p.logits.tiles);
  float below[kTileLimits] = {};
  for (int32_t tile = static_cast<int32_t>(threadIdx.x); tile < p.logits.tiles;
       tile += kRowThreads) {
    const float bound = tile_bound(p, row, tile, row_max);
    float limit = least;
#pragma unroll
    for (int i = 0; i < kTileLimits; ++i, limit *= kTileLimitStep)
      below[i] += bound <= limit ? bound : 0.0f;
  }
  const uint32_t warp = device::warp_index();
#pragma unroll
  for (int i = 0; i < kTileLimits; ++i) {
    below[i] = warp_sum(below[i]);
    if (device::lane_index() == 0) shared.below[i][warp] = below[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileLimits; ++i) {
    below[i] = 0.0f;
#pragma unroll
    for (int32_t w = 0; w < kRowWarps; ++w) below[i] += shared.below[i][w];
  }
  return choose_tile_limit(below, least, budget);
}

__global__ void __launch_bounds__(kRowThreads) soft_select_tiles(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!is_in_round(p, request) || !has_sum(p, row)) return;
  Shared& shared = device::shared_memory<Shared>();
  const int32_t lane = static_cast<int32_t>(device::lane_index()) % kSoftLanes;
  const int32_t worker = static_cast<int32_t>(device::warp_index()) * kTilesAtOnce +
                         static_cast<int32_t>(device::lane_index()) / kSoftLanes;
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const auto* const raw_row =
      static_cast<const device::bfloat16*>(logits.raw) + row * logits.vocabulary;
  const float row_max = rounded(p.row_max[row]);

  const TileLimit limit = find_limit(p, row, row_max, shared);

  double sum = 0.0;
  for (int32_t tile = worker; tile - worker % kTilesAtOnce < logits.tiles; tile += kWorkers) {
    const bool there = tile < logits.tiles;
    const bool reads = there && tile_bound(p, row, tile, row_max) > limit.limit;
    if (!__any_sync(device::kAllLanes, reads)) continue;
    const int32_t first = tile * kTile + lane * kLaneEntries;
    const uint32_t usable = reads ? SoftTile::usable(bits, logits.vocabulary, first) : 0;
    float z[SoftTile::kEntries];
    read_tile(raw_row, logits.vocabulary, first, reads, z);
    scale(z, z);
    device::bfloat16* const to = soft_entries(p, row, there ? tile : 0);
    float weight[SoftTile::kQuads];
#pragma unroll
    for (int quad = 0; quad < SoftTile::kQuads; ++quad) {
      const int32_t offset = SoftTile::offset(quad * kLaneEntries);
      const int at = quad * kLaneEntries;
#pragma unroll
      for (int i = 0; i < kLaneEntries; ++i)
        z[at + i] = usable >> (at + i) & 1 ? z[at + i] : -INFINITY;
      const uint2 packed = {device::pack_bfloat16(z[at], z[at + 1]),
                            device::pack_bfloat16(z[at + 2], z[at + 3])};
      if (reads) *reinterpret_cast<uint2*>(to + offset) = packed;
      weight[quad] = expf(device::low_to_float(packed.x) - row_max);
      weight[quad] += expf(device::high_to_float(packed.x) - row_max);
      weight[quad] += expf(device::low_to_float(packed.y) - row_max);
      weight[quad] += expf(device::high_to_float(packed.y) - row_max);
    }
    sum += SoftTile::sum(weight);
    // Every row that needs the tile stores the same.
    if (reads && lane == 0) p.needed[request * logits.tiles + tile] = 1;
  }
  if (lane == 0) shared.sum[worker] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int32_t w = 1; w < kWorkers; ++w) sum += shared.sum[w];
  p.normaliser[row] = static_cast<float>(sum) + limit.share_of_sum();
  p.limit[row] = limit.limit;
  p.skipped_mass[row] = limit.skipped;
}

// Clears the tables that soft_select_tiles adds to.
__global__ void __launch_bounds__(kRowThreads) soft_clear(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.x;
  const bool part = is_in_round(p, request);
  if (!part) return;
  for (int32_t tile = static_cast<int32_t>(threadIdx.x); tile < p.logits.tiles; tile += kRowThreads)
    p.needed[request * p.logits.tiles + tile] = 0;
  if (threadIdx.x == 0 && !p.dense) p.failed[request] = 0;
}

}  // namespace

const char* launch_soft_select_tiles(const SoftPlan& /*plan*/, const SoftPass& pass, void* stream) {
  const Logits& logits = pass.logits;
  const device::LaunchShape clear = {.grid = dim3(static_cast<unsigned>(logits.batch)),
                                     .threads = kRowThreads,
                                     .overlaps_previous_kernel = true};
  if (const char* error = device::launch(clear, stream, soft_clear, pass)) return error;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_select_tiles, pass);
}

}  // namespace dgemma
