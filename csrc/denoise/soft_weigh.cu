// Which vocabulary tiles each row needs, its normaliser, and what the others may weigh: a block has
// a row, a warp a tile at a time. Tiles that a row does not need are not read.
#include "denoise/row_scan.h"
#include "denoise/soft_weights.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Shared {
  double sum[kRowWarps];
  float left_out[kRowWarps];
};

__global__ void __launch_bounds__(kRowThreads) soft_weigh(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!takes_part(p, request) || !has_sum(p, row)) return;
  Shared& shared = device::shared_memory<Shared>();
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t warp = static_cast<int32_t>(device::warp_index());
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const float row_max = rounded(p.row_max[row]);

  double sum = 0.0;
  float left_out = 0.0f;
  for (int32_t tile = warp; tile < logits.tiles; tile += kRowWarps) {
    const float bound = tile_bound(p.tile_max[row * logits.tiles + tile], row_max);
    if (!reads_tile(p, bound)) {
      left_out += bound;
      continue;
    }
    const int32_t first = tile * kTile + lane * kLaneEntries;
    const uint32_t usable = usable_entries(bits, logits.vocabulary, first);
    float raw[kLaneEntries], weight = 0.0f;
    read_entries<device::bfloat16>(logits, row, first, usable, raw);
#pragma unroll
    for (int i = 0; i < kLaneEntries; ++i)
      if (usable >> i & 1) weight += expf(rounded(scale(raw[i])) - row_max);
    sum += warp_sum(weight);
    // Every row that needs the tile stores the same.
    if (lane == 0) p.wanted[request * logits.tiles + tile] = 1;
  }
  if (lane == 0) {
    shared.sum[warp] = sum;
    shared.left_out[warp] = left_out;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int32_t w = 1; w < kRowWarps; ++w) {
    sum += shared.sum[w];
    left_out += shared.left_out[w];
  }
  p.normaliser[row] = static_cast<float>(sum);
  p.left_out[row] = left_out;
}

// The tables that soft_weigh adds to.
__global__ void __launch_bounds__(kRowThreads) soft_clear(const SoftPass p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.x;
  const bool part = takes_part(p, request);
  if (!part) return;
  for (int32_t tile = static_cast<int32_t>(threadIdx.x); tile < p.logits.tiles; tile += kRowThreads)
    p.wanted[request * p.logits.tiles + tile] = 0;
  if (threadIdx.x == 0 && !p.dense) p.failed[request] = 0;
}

}  // namespace

const char* launch_soft_weigh(const SoftPlan& /*plan*/, const SoftPass& pass, void* stream) {
  const Logits& logits = pass.logits;
  const device::LaunchShape clear = {.grid = dim3(static_cast<unsigned>(logits.batch)),
                                     .threads = kRowThreads,
                                     .overlaps_previous_kernel = true};
  if (const char* problem = device::launch(clear, stream, soft_clear, pass)) return problem;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_weigh, pass);
}

}  // namespace dgemma
