// The probabilities of the listed tiles, rounded to bfloat16, in the place of their z: a warp has
// four tiles of a row at a time. A row that does not need a tile of the list has zeros there.
#include "denoise/cuda/soft_tiles.h"
#include "device/launch.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
// Blocks of a row: enough that a canvas of one request makes several for every multiprocessor.
constexpr int32_t kBlocksPerRow = 8;

__global__ void __launch_bounds__(kThreads) soft_probabilities(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x / kBlocksPerRow, request = row / logits.length;
  if (!is_in_round(p, request)) return;
  const bool summed = has_sum(p, row);
  const int32_t group = static_cast<int32_t>(device::lane_index()) / kSoftLanes;
  // A row without a sum, or a tile that it does not read: z is minus infinity, so all are zero.
  constexpr uint32_t kMinusInfinities = 0xff80ff80;
  const float row_max = summed ? rounded(p.row_max[row]) : 0.0f;
  const float share = summed ? 1.0f / p.normaliser[row] : 0.0f;
  const float limit = summed ? p.limit[row] : 0.0f;
  const int32_t* const list = p.list + request * logits.tiles;
  const int32_t count = p.count[request];
  const int32_t warp = static_cast<int32_t>(blockIdx.x % kBlocksPerRow) * kWarps +
                       static_cast<int32_t>(device::warp_index());
  for (int32_t at = warp * kTilesAtOnce + group; at < count;
       at += kBlocksPerRow * kWarps * kTilesAtOnce) {
    const int32_t tile = list[at];
    const bool reads = summed && tile_bound(p, row, tile, row_max) > limit;
    device::bfloat16* const entries = soft_entries(p, row, tile);
    uint2 z[SoftTile::kQuads];
#pragma unroll
    for (int quad = 0; quad < SoftTile::kQuads; ++quad)
      z[quad] =
          reads ? *reinterpret_cast<const uint2*>(entries + SoftTile::offset(quad * kLaneEntries))
                : uint2{kMinusInfinities, kMinusInfinities};
    const auto probability = [&](float of) { return expf(of - row_max) * share; };
#pragma unroll
    for (int quad = 0; quad < SoftTile::kQuads; ++quad)
      *reinterpret_cast<uint2*>(entries + SoftTile::offset(quad * kLaneEntries)) = {
          device::pack_bfloat16(probability(device::low_to_float(z[quad].x)),
                                probability(device::high_to_float(z[quad].x))),
          device::pack_bfloat16(probability(device::low_to_float(z[quad].y)),
                                probability(device::high_to_float(z[quad].y)))};
  }
}

}  // namespace

const char* launch_soft_probabilities(const SoftPlan& /*plan*/, const SoftPass& pass,
                                      void* stream) {
  const unsigned rows = static_cast<unsigned>(pass.logits.batch * pass.logits.length);
  const device::LaunchShape shape = {
      .grid = dim3(rows * kBlocksPerRow), .threads = kThreads, .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_probabilities, pass);
}

}  // namespace dgemma
