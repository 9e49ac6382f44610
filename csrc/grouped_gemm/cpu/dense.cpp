// The C entry points of the dense projection on the CPU: argument checks and what each task is.
#include "grouped_gemm/cpu/dense.h"

#include <cinttypes>

#include "common/ceil_divide.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "grouped_gemm/cpu/quantized.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

// No single extent may be larger, so that products of two are exact.
constexpr int64_t kLargestExtent = INT32_MAX;

// Cuts the workspace out of `base`, or without one only counts the bytes.
size_t carve(const dgemma_dense& op, const dgemma_quantized* weight, void* base,
             Int8Tokens* rounded) {
  Carver carver = {static_cast<char*>(base)};
  if (is_int8(weight)) *rounded = take_int8_tokens(&carver, op.rows, op.in_features);
  return carver.used;
}

size_t count_workspace_bytes(const dgemma_dense& op, const dgemma_quantized* weight) {
  Int8Tokens none;
  return carve(op, weight, nullptr, &none);
}

dgemma_status check(const dgemma_dense& op, const dgemma_quantized* weight, dgemma_cpu* cpu) {
  const struct {
    const char* name;
    int64_t value, least;
  } extents[] = {{"rows", op.rows, 0},
                 {"in_features", op.in_features, 1},
                 {"out_features", op.out_features, 1}};
  for (const auto& [name, value, least] : extents)
    if (value < least || value > kLargestExtent)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "%s: got %" PRId64 ", wants %" PRId64 " to %" PRId64, name, value, least,
                  kLargestExtent);
  if (op.dtype != DGEMMA_FLOAT32 && op.dtype != DGEMMA_BFLOAT16)
    return fail(cpu, DGEMMA_UNSUPPORTED, "dtype: got %d, wants %d (float32) or %d (bfloat16)",
                static_cast<int>(op.dtype), DGEMMA_FLOAT32, DGEMMA_BFLOAT16);
  if (op.rows == 0) return DGEMMA_OK;
  if (weight != nullptr)
    if (const auto status =
            check_quantized("weight", *weight, op.out_features, op.in_features, cpu))
      return status;
  const OperandList operands = operands_of(op, weight);
  if (const auto status = check_operands(operands, cpu)) return status;
  return check_workspace(operands, op.workspace, op.workspace_bytes,
                         count_workspace_bytes(op, weight), cpu);
}

// `weight` is NULL where op has its weight itself.
dgemma_status run(const dgemma_dense& op, const dgemma_quantized* weight, dgemma_cpu* cpu) {
  dgemma_status status = check(op, weight, cpu);
  if (status != DGEMMA_OK) return status;
  dgemma_cpu_variant variant;
  status = resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK || op.rows == 0) return status;

  const DenseTask* const table = weight != nullptr ? DGEMMA_TABLE_OF(variant, quantized_dense_tasks)
                                                   : DGEMMA_TABLE_OF(variant, dense_tasks);
  const DenseTask task = table[op.dtype];
  Int8Tokens rounded = {};
  carve(op, weight, op.workspace, &rounded);
  if (is_int8(weight))
    round_rows(cpu, DGEMMA_TABLE_OF(variant, int8_round_tasks)[op.dtype], op.input, op.rows,
               op.in_features, rounded);
  const DensePass pass = {op, weight, rounded};
  const int64_t tasks = ceil_divide(op.out_features, kDenseRowsPerTask);
  run_tasks(cpu, tasks, [&](int64_t index) {
    const int64_t first = index * kDenseRowsPerTask, end = first + kDenseRowsPerTask;
    task(pass, first, end < op.out_features ? end : op.out_features);
  });
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_dense_workspace(const dgemma_dense* /*op*/) { return 0; }

dgemma_status dgemma_cpu_dense(const dgemma_dense* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::run(*op, nullptr, cpu);
}

size_t dgemma_cpu_dense_quantized_workspace(const dgemma_dense_quantized* op) {
  using namespace dgemma;
  if (op == nullptr || op->dense.rows < 0 || op->dense.rows > kLargestExtent ||
      op->dense.in_features < 1 || op->dense.in_features > kMostQuantizedColumns)
    return 0;
  return count_workspace_bytes(op->dense, &op->weight);
}

dgemma_status dgemma_cpu_dense_quantized(const dgemma_dense_quantized* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::run(op->dense, &op->weight, cpu);
}
