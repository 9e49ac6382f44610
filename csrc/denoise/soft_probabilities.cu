// The probabilities of the listed tiles, rounded to bfloat16 and stored side by side: a warp has a
// tile of a row at a time. A row that does not need a tile of the list has zeros there.
#include "denoise/soft_weights.h"
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
  if (!takes_part(p, request)) return;
  const bool summed = has_sum(p, row);
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const float row_max = rounded(p.row_max[row]);
  const float normaliser = summed ? p.normaliser[row] : 1.0f;
  const int32_t* const list = p.list + request * logits.tiles;
  device::bfloat16* const to =
      p.probabilities + row * static_cast<int64_t>(logits.tiles) * kTile + lane * kLaneEntries;
  const int32_t begin = static_cast<int32_t>(blockIdx.x % kBlocksPerRow) * kWarps +
                        static_cast<int32_t>(device::warp_index());
  for (int32_t at = begin; at < p.count[request]; at += kBlocksPerRow * kWarps) {
    const int32_t tile = list[at];
    float probability[kLaneEntries] = {};
    if (summed && reads_tile(p, tile_bound(p.tile_max[row * logits.tiles + tile], row_max))) {
      const int32_t first = tile * kTile + lane * kLaneEntries;
      const uint32_t usable = usable_entries(bits, logits.vocabulary, first);
      float raw[kLaneEntries];
      read_entries<device::bfloat16>(logits, row, first, usable, raw);
#pragma unroll
      for (int i = 0; i < kLaneEntries; ++i)
        if (usable >> i & 1) probability[i] = expf(rounded(scale(raw[i])) - row_max) / normaliser;
    }
    *reinterpret_cast<uint2*>(to + static_cast<int64_t>(at) * kTile) = {
        device::pack_bfloat16(probability[0], probability[1]),
        device::pack_bfloat16(probability[2], probability[3])};
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
