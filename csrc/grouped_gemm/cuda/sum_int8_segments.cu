// The output of a dense projection over INT8 weights where its segments were work tiles of their
// own: their sum, exact in any order, times the scale of the row of input and then the weight row's
// factor, rounded once. A thread has 8 values, which are 16 bytes of the output.
#include "device/launch.h"
#include "device/memory.h"
#include "grouped_gemm/cuda/quantized.h"

namespace dgemma {
namespace {

struct Segments {
  const int32_t* partial;                // [segments, rows, out_features]
  const float* scales;                   // [rows]
  QuantizedMatrix weight;                // for its factors
  device::bfloat16* output;              // [rows, out_features]
  int32_t segments, rows, out_features;  // out_features: a multiple of 8
};

__global__ void __launch_bounds__(kSumSegmentsThreads) sum_int8_segments(const Segments p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t values = static_cast<int64_t>(p.rows) * p.out_features;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumSegmentsThreads + threadIdx.x) * 8;
  if (at >= values) return;

  int32_t sum[8] = {};
  for (int32_t segment = 0; segment < p.segments; ++segment) {
    const int32_t* from = p.partial + segment * values + at;
    const uint4 low = device::load_once(from), high = device::load_once(from + 4);
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += static_cast<int32_t>(bits[i]);
  }
  const int32_t row = static_cast<int32_t>(at / p.out_features);
  const int32_t feature = static_cast<int32_t>(at % p.out_features);
  const float scale = p.scales[row];
  float scaled[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    scaled[i] = static_cast<float>(sum[i]) * scale * p.weight.row_scale(feature + i);
  const uint4 rounded = {
      device::pack_bfloat16(scaled[0], scaled[1]), device::pack_bfloat16(scaled[2], scaled[3]),
      device::pack_bfloat16(scaled[4], scaled[5]), device::pack_bfloat16(scaled[6], scaled[7])};
  *reinterpret_cast<uint4*>(p.output + at) = rounded;
}

}  // namespace

const char* launch_sum_int8_segments(const DensePlan& plan, const DenseQuantizedCall& call,
                                     void* stream) {
  const DenseTileScheduler& scheduler = call.dense.scheduler;
  const Segments p = {.partial = call.partial,
                      .scales = call.input.scales,
                      .weight = call.weight,
                      .output = call.dense.output,
                      .segments = scheduler.segments,
                      .rows = scheduler.rows,
                      .out_features = call.dense.out_features};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.sum_blocks)),
                                     .threads = kSumSegmentsThreads,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, sum_int8_segments, p);
}

}  // namespace dgemma
