// append_to_pages on the CPU: rows are copied, nothing is computed.
#include <cstring>

#include "block_attention/cpu/page_checks.h"
#include "dgemma/block_attention.h"

namespace dgemma {
namespace {

// Rows per task, as in append_to_cache.
constexpr int64_t kRowsPerTask = 64;

void copy_rows(const dgemma_append_to_pages& op, int64_t first) {
  const int64_t end = first + kRowsPerTask < op.tokens ? first + kRowsPerTask : op.tokens;
  const int64_t element = op.dtype == DGEMMA_BFLOAT16 ? 2 : sizeof(float);
  const auto bytes = static_cast<size_t>(op.head_dim * element);
  const auto copy = [&](void* pages, const void* rows, int64_t row, int64_t to,
                        int64_t head_stride) {
    for (int64_t head = 0; head < op.key_heads; ++head)
      std::memcpy(
          static_cast<char*>(pages) + (to + head * head_stride) * element,
          static_cast<const char*>(rows) + (row * op.key_heads + head) * op.head_dim * element,
          bytes);
  };
  for (int64_t i = first; i < end; ++i) {
    if (op.slot[i] < 0) continue;
    const int64_t page = op.slot[i] / op.page_size;
    const int64_t row = op.slot[i] % op.page_size;
    copy(op.key_pages, op.key, i, page * op.key_page_stride + row * op.key_row_stride,
         op.key_head_stride);
    copy(op.value_pages, op.value, i, page * op.value_page_stride + row * op.value_row_stride,
         op.value_head_stride);
  }
}

dgemma_status check(const dgemma_append_to_pages& op, dgemma_cpu* cpu) {
  if (const auto status = check_extent(cpu, "tokens", op.tokens, 0)) return status;
  if (const auto status = check_page_extents(op, cpu)) return status;
  if (const auto status = check_operands(operands_of(op), cpu)) return status;
  if (op.tokens > 0 && op.pages > 0) {
    if (const char* pool = pool_that_overlaps(op))
      return invalid(cpu, "%s: got strides by which its rows overlap, wants rows apart", pool);
    if (pools_overlap(op))
      return invalid(cpu, "value_pages: got %p, which overlaps key_pages, wants memory of its own",
                     op.value_pages);
  }
  const int64_t slots = op.pages * op.page_size;
  for (int64_t i = 0; i < op.tokens; ++i)
    if (op.slot[i] >= slots)
      return invalid(cpu, "slot[%lld]: got %lld, wants less than %lld", static_cast<long long>(i),
                     static_cast<long long>(op.slot[i]), static_cast<long long>(slots));
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_append_to_pages(const dgemma_append_to_pages* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  if (const auto status = dgemma::check(*op, cpu)) return status;
  const int64_t tasks = (op->tokens + dgemma::kRowsPerTask - 1) / dgemma::kRowsPerTask;
  dgemma::run_tasks(cpu, tasks,
                    [&](int64_t i) { dgemma::copy_rows(*op, i * dgemma::kRowsPerTask); });
  return DGEMMA_OK;
}
