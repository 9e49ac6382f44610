// A dense projection's output where its segments were work tiles of their own: their sum in their
// order, in fp32, rounded once. A thread has 8 values, which are 16 bytes of the output.
#include "device/launch.h"
#include "device/memory.h"
#include "grouped_gemm/cuda/dense.h"

namespace dgemma {
namespace {

__global__ void __launch_bounds__(kSumSegmentsThreads) sum_segments(const DenseCall p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t values = static_cast<int64_t>(p.scheduler.rows) * p.out_features;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumSegmentsThreads + threadIdx.x) * 8;
  if (at >= values) return;

  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = kNegativeZero;
  for (int32_t segment = 0; segment < p.scheduler.segments; ++segment) {
    const float* from = p.partial + segment * values + at;
    const uint4 low = device::load_once(from), high = device::load_once(from + 4);
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += __uint_as_float(bits[i]);
  }
  const uint4 rounded = {
      device::pack_bfloat16(sum[0], sum[1]), device::pack_bfloat16(sum[2], sum[3]),
      device::pack_bfloat16(sum[4], sum[5]), device::pack_bfloat16(sum[6], sum[7])};
  *reinterpret_cast<uint4*>(p.output + at) = rounded;
}

}  // namespace

const char* launch_sum_segments(const DensePlan& plan, const DenseCall& call, void* stream) {
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.sum_blocks)),
                                     .threads = kSumSegmentsThreads,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, sum_segments, call);
}

}  // namespace dgemma
