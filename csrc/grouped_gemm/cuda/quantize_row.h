// What the kernels that round rows of activations share (quantize_rows*.cu). A warp has a row: it
// reads it for the largest magnitude, and once more, out of the cache, to round it.
#pragma once

#include "device/launch.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/plan_rows.h"
#include "grouped_gemm/cuda/quantize_rows.h"

namespace dgemma {

// The row of this warp, which may be none.
DGEMMA_DEVICE int32_t own_quantized_row() {
  return static_cast<int32_t>(blockIdx.x) * (kQuantizeRowsThreads / 32) +
         static_cast<int32_t>(device::warp_index());
}
DGEMMA_DEVICE bool is_filled(const QuantizeRows& p, int32_t row) {
  return row < (p.filled != nullptr ? min(p.rows, *p.filled) : p.rows);
}

DGEMMA_DEVICE uint32_t largest_of(uint32_t largest, uint32_t pair) {
  const uint32_t magnitudes = pair & 0x7fff7fffu;
  return max(max(largest, magnitudes >> 16), magnitudes & 0xffffu);
}

// The largest magnitude as bits of bfloat16, whose order is theirs; NaN is above all.
DGEMMA_DEVICE uint32_t largest_magnitude(const QuantizeRows& p, int32_t row) {
  const device::bfloat16* from = p.input + static_cast<int64_t>(row) * p.width;
  uint32_t largest = 0;
  for (int32_t column = 8 * static_cast<int32_t>(device::lane_index()); column < p.width;
       column += 256) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from + column);
    largest = largest_of(largest_of(largest, piece.x), piece.y);
    largest = largest_of(largest_of(largest, piece.z), piece.w);
  }
  return __reduce_max_sync(device::kAllLanes, largest);
}

// Stores the row's bytes: round(four products with `inverse`) gives four of them.
template <typename Round>
DGEMMA_DEVICE void store_row(const QuantizeRows& p, int32_t row, float inverse,
                             const Round& round) {
  const device::bfloat16* from = p.input + static_cast<int64_t>(row) * p.width;
  uint8_t* to = p.output + static_cast<int64_t>(row) * p.width;
  const auto four = [&](uint32_t first, uint32_t second) {
    // __fmul_rn keeps the product from being fused with what follows.
    const float x[4] = {__fmul_rn(device::low_to_float(first), inverse),
                        __fmul_rn(device::high_to_float(first), inverse),
                        __fmul_rn(device::low_to_float(second), inverse),
                        __fmul_rn(device::high_to_float(second), inverse)};
    return round(x);
  };
  for (int32_t column = 8 * static_cast<int32_t>(device::lane_index()); column < p.width;
       column += 256) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from + column);
    const uint2 rounded = {four(piece.x, piece.y), four(piece.z, piece.w)};
    *reinterpret_cast<uint2*>(to + column) = rounded;
  }
}

inline device::LaunchShape shape_of_rows(const QuantizeRows& call) {
  return {.grid = dim3(static_cast<unsigned>(quantize_rows_blocks(call.rows))),
          .threads = kQuantizeRowsThreads,
          .overlaps_previous_kernel = true};
}

}  // namespace dgemma
