// Rows of activations in int8, as grouped_gemm/cpu/int8_kernel.h rounds them: the same codes and
// scales.
#include "device/bytes.h"
#include "grouped_gemm/cuda/quantize_row.h"

namespace dgemma {
namespace {

constexpr float kLargest = 127.0f;
constexpr uint32_t kInfinity = 0x7f80;  // of bfloat16
constexpr float kLargestFloat = 0x1.fffffep127f;

// A sum with 1.5 * 2^23 is rounded to a whole number, ties to even, whose low byte is the code.
DGEMMA_DEVICE uint32_t to_int8(float x) { return __float_as_uint(__fadd_rn(x, 12582912.0f)); }

__global__ void __launch_bounds__(kQuantizeRowsThreads) quantize_rows_int8(const QuantizeRows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t row = own_quantized_row();
  if (!is_filled(p, row)) return;
  const uint32_t bits = largest_magnitude(p, row);
  const float largest = __uint_as_float(bits << 16);
  // Where one value is no finite number, no product of the row is.
  const bool finite = bits < kInfinity;
  if (device::lane_index() == 0)
    p.scales[row] = finite ? largest / kLargest : __uint_as_float(0x7fffffffu);
  // Infinite for a row of zeros, or of less than 2^-121 or so: its codes are zeros.
  const float inverse = kLargest / largest;
  store_row(p, row, inverse <= kLargestFloat ? inverse : 0.0f, [](const float (&x)[4]) {
    const uint32_t low = device::permute_bytes(to_int8(x[0]), to_int8(x[1]), 0x0040);
    const uint32_t high = device::permute_bytes(to_int8(x[2]), to_int8(x[3]), 0x0040);
    return device::permute_bytes(low, high, 0x5410);
  });
}

}  // namespace

const char* launch_quantize_rows_int8(const QuantizeRows& call, void* stream) {
  return device::launch(shape_of_rows(call), stream, quantize_rows_int8, call);
}

}  // namespace dgemma
