#include "grouped_gemm/cpu/quantized.h"

#include <cinttypes>

namespace dgemma {

dgemma_status check_quantized(const char* name, const dgemma_quantized& matrix, int64_t run,
                              int64_t columns, dgemma_cpu* cpu) {
  const bool has_scales = matrix.format != DGEMMA_WEIGHTS_FP8;
  int64_t multiple = 1;
  bool group_fits = false;
  switch (matrix.format) {
    case DGEMMA_WEIGHTS_FP8:
      group_fits = matrix.group == 0;
      break;
    case DGEMMA_WEIGHTS_INT4:
      multiple = 2;
      group_fits = matrix.group == 32 || matrix.group == 64 || matrix.group == 128;
      break;
    case DGEMMA_WEIGHTS_NVFP4:
      multiple = 16;
      group_fits = matrix.group == 16;
      break;
    default:
      return fail(cpu, DGEMMA_UNSUPPORTED,
                  "%s.format: got %d, wants %d (fp8), %d (int4), %d (nvfp4)", name,
                  static_cast<int>(matrix.format), DGEMMA_WEIGHTS_FP8, DGEMMA_WEIGHTS_INT4,
                  DGEMMA_WEIGHTS_NVFP4);
  }
  if (!group_fits)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "%s.group: got %d, wants 0 (fp8), 32, 64 or 128 (int4), 16 (nvfp4)", name,
                matrix.group);
  if (columns % multiple != 0 || columns > kMostQuantizedColumns)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "%s: got %" PRId64 " columns, wants a multiple of %" PRId64 " up to %" PRId64, name,
                columns, multiple, kMostQuantizedColumns);
  if (matrix.values == nullptr)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "%s.values: got NULL, wants a pointer", name);
  if (has_scales && matrix.scales == nullptr)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "%s.scales: got NULL, wants a pointer", name);
  if (matrix.format == DGEMMA_WEIGHTS_INT4 && matrix.scale_dtype != DGEMMA_BFLOAT16 &&
      matrix.scale_dtype != DGEMMA_FLOAT16)
    return fail(cpu, DGEMMA_UNSUPPORTED,
                "%s.scale_dtype: got %d, wants %d (bfloat16) or %d (float16)", name,
                static_cast<int>(matrix.scale_dtype), DGEMMA_BFLOAT16, DGEMMA_FLOAT16);
  if (matrix.factors != nullptr &&
      (matrix.rows_per_factor < 1 || run % matrix.rows_per_factor != 0))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "%s.rows_per_factor: got %" PRId64 ", wants a divisor of %" PRId64, name,
                matrix.rows_per_factor, run);
  return DGEMMA_OK;
}

}  // namespace dgemma
