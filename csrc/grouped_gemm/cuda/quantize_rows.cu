// Rows of activations in e4m3.
#include "grouped_gemm/cuda/quantize_row.h"

namespace dgemma {
namespace {

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

__global__ void __launch_bounds__(kQuantizeRowsThreads) quantize_rows(const QuantizeRows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t row = own_quantized_row();
  if (!is_filled(p, row)) return;
  const uint32_t bits = largest_magnitude(p, row);
  const float largest = __uint_as_float(bits << 16);
  if (device::lane_index() == 0) p.scales[row] = largest / kLargest;
  store_row(p, row, bits != 0 ? kLargest / largest : 0.0f, [](const float (&x)[4]) {
    return to_e4m3(x[0]) | to_e4m3(x[1]) << 8 | to_e4m3(x[2]) << 16 | to_e4m3(x[3]) << 24;
  });
}

}  // namespace

const char* launch_quantize_rows(const QuantizeRows& call, void* stream) {
  return device::launch(shape_of_rows(call), stream, quantize_rows, call);
}

}  // namespace dgemma
