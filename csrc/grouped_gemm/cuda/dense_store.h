// Where the sums of a dense projection go: rounded to the output, or as they are to the workspace.
#pragma once

#include "grouped_gemm/cuda/dense.h"
#include "grouped_gemm/cuda/pack_rows.h"

namespace dgemma {

// What a warp has of 16 weight rows by 8 tokens: `d` is laid out as mma's and wgmma's accumulators
// are. `feature` is the first row's, `token` the first token's number within the unit.
DGEMMA_DEVICE void store_dense(const DenseCall& p, const DenseUnit& unit, const float* d,
                               int32_t feature, int32_t token) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  if (p.work.apart) {
    // Eight lanes write 32 bytes, a sector of the L2.
    float* segment =
        p.partial + static_cast<int64_t>(unit.segment) * p.work.rows * p.out_features + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t row = lane / 4 + 8 * (i / 2), at = token + 2 * (lane % 4) + i % 2;
      if (at < unit.rows && feature + row < p.out_features)
        segment[static_cast<int64_t>(unit.first + at) * p.out_features + row] = d[i];
    }
    return;
  }
  const int32_t at = token + packed_token();
  device::bfloat16* row = p.output + static_cast<int64_t>(unit.first + at) * p.out_features;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t packed = pack_rows(d[2 * half], d[2 * half + 1]);
    const int32_t column = feature + 8 * half + packed_row();
    if (at < unit.rows && column < p.out_features)
      *reinterpret_cast<uint32_t*>(row + column) = packed;
  }
}

}  // namespace dgemma
