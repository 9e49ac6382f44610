// Combines the splits of a row into its output: they are brought to one maximum, added in order and
// divided. A warp has a query of a head.
#include <cmath>

#include "block_attention/cuda/attention.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/warp.h"

namespace dgemma {
namespace {

constexpr int32_t kWarps = kCombineThreads / 32;

__global__ void __launch_bounds__(kCombineThreads) combine_splits(const Attention p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t index = static_cast<int32_t>(blockIdx.y);
  const AttentionRequest request = find_request(p, index);
  if (request.splits <= 1) return;
  const int32_t row =
      static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(device::warp_index());
  const int32_t query = row / p.query_heads, head = row % p.query_heads;
  if (query >= request.rows) return;
  const int32_t group = p.query_heads / p.key_heads, packed = query * group + head % group;
  const int64_t tile =
      index * p.partial_tiles +
      (static_cast<int64_t>(head / group) * request.row_tiles + packed / p.rows) * request.splits;
  const int64_t first = tile * p.rows + packed % p.rows;  // then p.rows further for each split

  float largest = -INFINITY;
  for (int32_t split = 0; split < request.splits; ++split)
    largest = fmaxf(largest, p.sums[2 * (first + split * p.rows)]);
  float weight[kMostSplits], sum = 0.0f;
#pragma unroll
  for (int32_t split = 0; split < kMostSplits; ++split) {
    weight[split] = 0.0f;
    if (split >= request.splits) continue;
    const float* const of_split = p.sums + 2 * (first + split * p.rows);
    weight[split] = device::exp2_approximate(of_split[0] - largest);
    sum += weight[split] * of_split[1];
  }
  device::bfloat16* const out =
      p.output + ((first_row_of(p, index) + query) * p.query_heads + head) * p.head_dim;
  // Four columns to a lane; the smallest head has 16.
  for (int32_t column = 4 * static_cast<int32_t>(device::lane_index()); column < p.head_dim;
       column += 4 * 32) {
    float4 value = {};
#pragma unroll
    for (int32_t split = 0; split < kMostSplits; ++split) {
      if (split >= request.splits) continue;
      const float4 part = *reinterpret_cast<const float4*>(
          p.partial + (first + split * p.rows) * p.head_dim + column);
      value.x += weight[split] * part.x;
      value.y += weight[split] * part.y;
      value.z += weight[split] * part.z;
      value.w += weight[split] * part.w;
    }
    *reinterpret_cast<uint2*>(out + column) = {device::pack_bfloat16(value.x / sum, value.y / sum),
                                               device::pack_bfloat16(value.z / sum, value.w / sum)};
  }
}

}  // namespace

const char* launch_combine_splits(const AttentionPlan& plan, const Attention& p, int32_t batch,
                                  void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(plan.combine_blocks), static_cast<unsigned>(batch)),
      .threads = kCombineThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, combine_splits, p);
}

}  // namespace dgemma
