// The statistics of every vocabulary tile of stored logits: a warp has a tile at a time. The
// vocabulary head does the same in its epilogue (head_epilogue.h); this is for logits that come
// from elsewhere.
#include "common/ceil_divide.h"
#include "denoise/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "device/launch.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
// Tiles that a warp takes one after the other: enough that reading the scale does not count, few
// enough that one canvas makes 16 blocks for every multiprocessor.
constexpr int32_t kTilesPerWarp = 32;

struct Tiles {
  Logits logits;
  float *tile_max, *tile_sum;
  TileParts parts;
  uint32_t blocks_per_row;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) tile_statistics_kernel(const Tiles p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x / p.blocks_per_row, request = row / logits.length;
  if (!is_active(logits.active, request)) return;
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t begin = (static_cast<int32_t>(blockIdx.x % p.blocks_per_row) * kWarps +
                         static_cast<int32_t>(device::warp_index())) *
                        kTilesPerWarp;
  const int32_t end = min(begin + kTilesPerWarp, logits.tiles);
  for (int32_t tile = begin; tile < end; ++tile) {
    const int32_t first = tile * kTile + lane * kLaneEntries;
    const uint32_t usable = usable_entries(bits, logits.vocabulary, first);
    float raw[kLaneEntries];
    read_entries<T>(logits, row, first, usable, raw);
    TileStatistics of_tile[1];
    tile_statistics<kLaneEntries>(raw, {usable}, first, scale, of_tile);
    const TileStatistics& statistics = of_tile[0];
    if (lane == 0) {
      const int64_t at = row * logits.tiles + tile;
      p.tile_max[at] = statistics.max;
      p.tile_sum[at] = statistics.sum;
      p.parts.shifted[at] = statistics.shifted;
      p.parts.best[at] = statistics.best;
      p.parts.index[at] = statistics.index;
    }
  }
}

}  // namespace

const char* launch_tile_statistics(const dgemma_vocabulary_statistics& op, const TileParts& parts,
                                   void* stream) {
  const Logits logits = make_logits(op.logits);
  constexpr int32_t each = kWarps * kTilesPerWarp;
  const uint32_t blocks_per_row = static_cast<uint32_t>(ceil_divide(logits.tiles, each));
  const uint32_t rows = static_cast<uint32_t>(logits.batch * logits.length);
  const device::LaunchShape shape = {
      .grid = dim3(rows * blocks_per_row), .threads = kThreads, .overlaps_previous_kernel = true};
  const auto kernel = op.logits.dtype == DGEMMA_BFLOAT16 ? tile_statistics_kernel<device::bfloat16>
                                                         : tile_statistics_kernel<float>;
  return device::launch(shape, stream, kernel,
                        Tiles{logits, op.tile_max, op.tile_sum, parts, blocks_per_row});
}

}  // namespace dgemma
