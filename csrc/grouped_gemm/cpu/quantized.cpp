#include "grouped_gemm/cpu/quantized.h"

#include <cinttypes>

namespace dgemma {

dgemma_status check_quantized(const char* name, const dgemma_quantized& matrix, int64_t run,
                              int64_t columns, dgemma_cpu* cpu) {
  if (!is_weight_format(matrix.format))
    return fail(cpu, DGEMMA_UNSUPPORTED,
                "%s.format: got %d, wants %d (fp8), %d (int4), %d (nvfp4), %d (int8)", name,
                static_cast<int>(matrix.format), DGEMMA_WEIGHTS_FP8, DGEMMA_WEIGHTS_INT4,
                DGEMMA_WEIGHTS_NVFP4, DGEMMA_WEIGHTS_INT8);
  const WeightFormat format = describe(matrix.format);
  if (!group_fits(format, matrix.group))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "%s.group: got %d, wants 0 (fp8, int8), 32, 64 or 128 (int4), 16 (nvfp4)", name,
                matrix.group);
  if (columns % format.column_multiple != 0 || columns > kMostQuantizedColumns)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "%s: got %" PRId64 " columns, wants a multiple of %d up to %" PRId64, name, columns,
                format.column_multiple, kMostQuantizedColumns);
  if (format.scales_are_bfloat16_or_half && matrix.scale_dtype != DGEMMA_BFLOAT16 &&
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
