// The C entry point on the CPU: checks, then runs of rows as tasks.
#include <cinttypes>
#include <cmath>

#include "common/ceil_divide.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "grouped_gemm/cpu/quantized.h"
#include "grouped_gemm/weight_format.h"
#include "quantize/cpu/kernels.h"
#include "quantize/operands.h"

namespace dgemma {
namespace {

// Values of one task: some milliseconds where the scales are searched.
constexpr int64_t kValuesPerTask = 65536;

// Columns that share a scale, as the formats have it.
dgemma_status check_groups(const dgemma_quantize_weight& op, dgemma_cpu* cpu) {
  const WeightFormat format = describe(op.format);
  const int64_t group = op.groups > 0 ? op.columns / op.groups : 0;
  if (format.scale_bytes == 0 && op.groups != 1)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "scales: got %" PRId64 " for a row of %s, wants one",
                op.groups, format.name);
  if (format.scale_bytes != 0 && (op.groups < 1 || op.columns % op.groups != 0 ||
                                  !group_fits(format, static_cast<int32_t>(group))))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "scales: got %" PRId64 " for a row of %" PRId64
                " columns of %s, wants one for each %d to %d",
                op.groups, op.columns, format.name, format.least_group, format.most_group);
  const int64_t bytes = row_bytes(op.format, op.columns);
  if (op.row_bytes != bytes)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "values: got %" PRId64 " bytes for a row of %" PRId64 " columns, wants %" PRId64,
                op.row_bytes, op.columns, bytes);
  return DGEMMA_OK;
}

dgemma_status check(const dgemma_quantize_weight& op, dgemma_cpu* cpu) {
  if (const auto status = check_sizes({{"rows", op.rows, 0},
                                       {"columns", op.columns, 1, kMostQuantizedColumns},
                                       {"groups", op.groups, 1},
                                       {"row_bytes", op.row_bytes, 1}},
                                      cpu))
    return status;
  if (const auto status = check_dtype(op.dtype, cpu)) return status;
  if (!is_weight_format(op.format))
    return fail(cpu, DGEMMA_UNSUPPORTED,
                "format: got %d, wants 1 (fp8), 2 (int4), 3 (nvfp4), 4 (int8)",
                static_cast<int>(op.format));
  if (const auto status = check_groups(op, cpu)) return status;
  if (!std::isfinite(op.multiplier) || !(op.multiplier > 0.0f))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "multiplier: got %g, wants a number above 0",
                static_cast<double>(op.multiplier));
  return op.rows == 0 ? DGEMMA_OK : check_operands(operands_of(op), cpu);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_quantize_weight(const dgemma_quantize_weight* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status = check(*op, cpu)) return status;
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  if (op->rows == 0) return DGEMMA_OK;
  const QuantizeTask task = DGEMMA_TABLE_OF(variant, quantize_tasks)[op->format - 1][op->dtype];
  const int64_t step = op->columns < kValuesPerTask ? kValuesPerTask / op->columns : 1;
  run_tasks(cpu, ceil_divide(op->rows, step), [&](int64_t index) {
    const int64_t first = index * step, end = first + step;
    task(*op, first, end < op->rows ? end : op->rows);
  });
  return DGEMMA_OK;
}
