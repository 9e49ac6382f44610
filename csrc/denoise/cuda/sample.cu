// Draws a row's token: a block has a row.
#include "denoise/cuda/draw_token.h"
#include "denoise/cuda/kernels.h"
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

template <typename T>
__global__ void __launch_bounds__(kRowThreads) sample_kernel(const Sample p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!is_active(logits.active, request)) return;
  const RowOfTiles tiles = {.logits = logits,
                            .row = row,
                            .tile_max = p.tile_max + row * logits.tiles,
                            .tile_sum = p.tile_sum + row * logits.tiles,
                            .row_max = p.row_max[row],
                            .row_sum = p.row_sum[row]};
  const double uniform =
      p.uniforms != nullptr
          ? p.uniforms[row]
          : draw_uniform(p.seed[request], p.canvas_index[request], p.step[request],
                         row % logits.length, DGEMMA_PURPOSE_SAMPLE);
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const int32_t token =
      draw_token<T>(tiles, uniform, device::shared_memory<DrawScratch>(),
                    [&](int32_t first) { return usable_entries(bits, logits.vocabulary, first); });
  if (threadIdx.x == 0)
    p.tokens[row] = token >= 0 ? token : lowest_allowed(bits, logits.vocabulary);
}

}  // namespace

const char* launch_sample(const dgemma_sample& op, void* stream) {
  const Logits logits = make_logits(op.logits);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(DrawScratch),
      .overlaps_previous_kernel = true};
  return device::launch(
      shape, stream,
      op.logits.dtype == DGEMMA_BFLOAT16 ? sample_kernel<device::bfloat16> : sample_kernel<float>,
      Sample{logits, op.row_max, op.row_sum, op.tile_max, op.tile_sum, op.seed, op.canvas_index,
             op.step, op.uniforms, op.tokens});
}

}  // namespace dgemma
