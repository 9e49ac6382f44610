// append_to_cache on the CPU: rows are copied, nothing is computed.
#include <cstring>

#include "block_attention/cpu/checks.h"
#include "dgemma/block_attention.h"

namespace dgemma {
namespace {

// Rows per task: with the model's 2,048 bf16 values a row, half a megabyte of keys and values.
constexpr int64_t kRowsPerTask = 64;

struct Append {
  const dgemma_append_to_cache& op;
  int64_t tasks_per_request;

  void copy(int64_t index) const {
    const int64_t b = index / tasks_per_request;
    const int64_t rows = op.length != nullptr ? op.length[b] : op.block_length;
    if (op.slot[b] < 0) return;
    // A block longer than the ring keeps its last rows.
    const int64_t oldest = rows > op.capacity ? rows - op.capacity : 0;
    const int64_t first = oldest + index % tasks_per_request * kRowsPerTask;
    const int64_t end = first + kRowsPerTask < rows ? first + kRowsPerTask : rows;
    const size_t bytes = static_cast<size_t>(op.key_heads * op.head_dim) *
                         (op.dtype == DGEMMA_BFLOAT16 ? 2 : sizeof(float));
    for (int64_t i = first; i < end; ++i) {
      const size_t from = static_cast<size_t>(b * op.block_length + i) * bytes;
      const size_t to =
          static_cast<size_t>(op.slot[b] * op.capacity + (op.prefix_length[b] + i) % op.capacity) *
          bytes;
      std::memcpy(static_cast<char*>(op.prefix_key) + to, static_cast<const char*>(op.key) + from,
                  bytes);
      std::memcpy(static_cast<char*>(op.prefix_value) + to,
                  static_cast<const char*>(op.value) + from, bytes);
    }
  }
};

dgemma_status check(const dgemma_append_to_cache& op, dgemma_cpu* cpu) {
  if (const auto status = check_extents(op, cpu)) return status;
  if (const auto status = check_operands(operands_of(op), cpu)) return status;
  if (const auto status = check_requests(op, cpu)) return status;
  // Two requests that wrote the same rows would keep whichever came last.
  for (int64_t b = 0; b < op.batch; ++b)
    for (int64_t other = 0; other < b; ++other)
      if (op.slot[b] >= 0 && op.slot[b] == op.slot[other])
        return invalid(cpu, "slot[%lld]: got %d, which slot[%lld] is too, wants another",
                       static_cast<long long>(b), op.slot[b], static_cast<long long>(other));
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_append_to_cache(const dgemma_append_to_cache* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  if (const auto status = dgemma::check(*op, cpu)) return status;
  if (op->capacity == 0) return DGEMMA_OK;
  dgemma::Append append = {*op,
                           (op->block_length + dgemma::kRowsPerTask - 1) / dgemma::kRowsPerTask};
  const int64_t tasks = op->batch * append.tasks_per_request;
  dgemma::run_tasks(cpu, tasks, [&](int64_t i) { append.copy(i); });
  return DGEMMA_OK;
}
