// The epilogue of a dense projection: its sums go rounded to the output, or as they are to the
// workspace.
#pragma once

#include "grouped_gemm/cuda/dense.h"
#include "grouped_gemm/cuda/pack_rows.h"

namespace dgemma {

// These store a warp's 16 weight rows by 8 tokens: `d` is laid out as mma's and wgmma's
// accumulators are. `feature` is the first row's, `token` the first token's number within the work
// tile.

// Sums as they are, to partial [segments, rows, out_features].
template <typename Element>
DGEMMA_DEVICE void store_segment(const DenseCall& p, const DenseWorkTile& work_tile,
                                 Element* partial, const Element* d, int32_t feature,
                                 int32_t token) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  // Eight lanes write 32 bytes, a sector of the L2.
  Element* segment = partial +
                     static_cast<int64_t>(work_tile.segment) * p.scheduler.rows * p.out_features +
                     feature;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t row = lane / 4 + 8 * (i / 2), at = token + 2 * (lane % 4) + i % 2;
    if (at < work_tile.rows && feature + row < p.out_features)
      segment[static_cast<int64_t>(work_tile.first + at) * p.out_features + row] = d[i];
  }
}

// Rounded, to the output. All lanes of the warp call this.
DGEMMA_DEVICE void store_rounded(const DenseCall& p, const DenseWorkTile& work_tile, const float* d,
                                 int32_t feature, int32_t token) {
  const int32_t at = token + packed_token();
  device::bfloat16* row = p.output + static_cast<int64_t>(work_tile.first + at) * p.out_features;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t packed = pack_rows(d[2 * half], d[2 * half + 1]);
    const int32_t column = feature + 8 * half + packed_row();
    if (at < work_tile.rows && column < p.out_features)
      *reinterpret_cast<uint32_t*>(row + column) = packed;
  }
}

DGEMMA_DEVICE void store_dense(const DenseCall& p, const DenseWorkTile& work_tile, const float* d,
                               int32_t feature, int32_t token) {
  if (p.scheduler.apart)
    store_segment(p, work_tile, p.partial, d, feature, token);
  else
    store_rounded(p, work_tile, d, feature, token);
}

}  // namespace dgemma
