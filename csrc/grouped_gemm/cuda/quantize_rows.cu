// Rows of activations in e4m3. A warp has a row: it reads it for the largest magnitude, and once
// more, out of the cache, to round it. A row of zeros has the scale 0.
#include "common/ceil_divide.h"
#include "device/launch.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/quantize_rows.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 128;
constexpr float kLargest = 448.0f;  // of e4m3

// Rounds to the nearest e4m3, ties to even, |x| up to 448 and what rounds to it; the sign bit goes
// along.
DGEMMA_DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  const float magnitude = min(__uint_as_float(bits & 0x7fffffffu), kLargest);
  if (magnitude < 0x1p-6f) {
    // Subnormal: a sum with 2^14, whose last bit is 2^-9, is rounded there.
    return sign | (__float_as_uint(magnitude + 0x1p14f) - __float_as_uint(0x1p14f));
  }
  // Three bits of fraction are kept of 23; the exponent's bias is 7 instead of 127.
  const uint32_t exact = __float_as_uint(magnitude);
  const uint32_t rounded = (exact + 0x7ffffu + (exact >> 20 & 1u)) >> 20;
  return sign | (rounded - (120u << 3));
}

DGEMMA_DEVICE uint32_t four_to_e4m3(uint32_t first, uint32_t second, float inverse) {
  // __fmul_rn keeps the product from being fused with what follows.
  return to_e4m3(__fmul_rn(device::low_to_float(first), inverse)) |
         to_e4m3(__fmul_rn(device::high_to_float(first), inverse)) << 8 |
         to_e4m3(__fmul_rn(device::low_to_float(second), inverse)) << 16 |
         to_e4m3(__fmul_rn(device::high_to_float(second), inverse)) << 24;
}

DGEMMA_DEVICE uint32_t largest_of(uint32_t largest, uint32_t pair) {
  const uint32_t magnitudes = pair & 0x7fff7fffu;
  return max(max(largest, magnitudes >> 16), magnitudes & 0xffffu);
}

__global__ void __launch_bounds__(kThreads) quantize_rows(const QuantizeRows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t row = static_cast<int32_t>(blockIdx.x) * (kThreads / 32) +
                      static_cast<int32_t>(device::warp_index());
  if (row >= (p.filled != nullptr ? min(p.rows, *p.filled) : p.rows)) return;
  const device::bfloat16* from = p.input + static_cast<int64_t>(row) * p.width;

  // Magnitudes of bfloat16 are in the order of their bits; NaN is above all.
  uint32_t largest = 0;
  for (int32_t column = 8 * lane; column < p.width; column += 256) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from + column);
    largest = largest_of(largest_of(largest, piece.x), piece.y);
    largest = largest_of(largest_of(largest, piece.z), piece.w);
  }
  largest = __reduce_max_sync(device::kAllLanes, largest);
  const float scale = __uint_as_float(largest << 16) / kLargest;
  const float inverse = largest != 0 ? kLargest / __uint_as_float(largest << 16) : 0.0f;
  if (lane == 0) p.scales[row] = scale;
  uint8_t* to = p.output + static_cast<int64_t>(row) * p.width;
  for (int32_t column = 8 * lane; column < p.width; column += 256) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from + column);
    const uint2 rounded = {four_to_e4m3(piece.x, piece.y, inverse),
                           four_to_e4m3(piece.z, piece.w, inverse)};
    *reinterpret_cast<uint2*>(to + column) = rounded;
  }
}

}  // namespace

const char* launch_quantize_rows(const QuantizeRows& call, void* stream) {
  const int32_t rows_of_block = kThreads / 32;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(call.rows, rows_of_block))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, quantize_rows, call);
}

}  // namespace dgemma
