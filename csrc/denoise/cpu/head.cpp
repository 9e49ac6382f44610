// The C entry points of the vocabulary head on the CPU: the product as a dense one, then the
// statistics of what it stored.
#include <cinttypes>

#include "cpu/entry.h"
#include "denoise/cpu/checks.h"
#include "dgemma/grouped_gemm.h"
#include "dgemma/vocabulary_head.h"

namespace dgemma {
namespace {

bool is_active(const dgemma_logits& logits, int64_t request) {
  return logits.active == nullptr || logits.active[request] != 0;
}

// The products of the requests [first, end). A row's bits do not depend on which rows share a call,
// so the embedding is read once for all of them.
dgemma_status multiply(const dgemma_vocabulary_head& op, int64_t first, int64_t end,
                       dgemma_cpu* cpu) {
  const dgemma_logits& logits = op.statistics.logits;
  const auto element = static_cast<int64_t>(bytes_of(logits.dtype));
  dgemma_dense product = {};
  product.rows = (end - first) * logits.length;
  product.in_features = op.hidden_size;
  product.out_features = logits.vocabulary;
  product.dtype = logits.dtype;
  product.input =
      static_cast<const char*>(op.hidden) + first * logits.length * op.hidden_size * element;
  product.weight = op.embedding;
  product.output = static_cast<char*>(op.raw) + first * logits.length * logits.vocabulary * element;
  return dgemma_cpu_dense(&product, cpu);
}

dgemma_status check_head(const dgemma_vocabulary_head& op, dgemma_cpu* cpu) {
  const dgemma_logits& logits = op.statistics.logits;
  if (const auto status = check_logits(logits, cpu)) return status;
  if (const auto status = check_sizes({{"hidden_size", op.hidden_size, 1}}, cpu)) return status;
  const int64_t rows = logits.batch * logits.length;
  if (rows > kLargestSize)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "batch x length: got %" PRId64 ", wants up to %" PRId64, rows, kLargestSize);
  return check_operands(operands_of(op), cpu);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_vocabulary_head_workspace(const dgemma_vocabulary_head* /*op*/) { return 0; }

dgemma_status dgemma_cpu_vocabulary_head(const dgemma_vocabulary_head* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_call(op, cpu)) return status;
  dgemma_vocabulary_statistics statistics = op->statistics;
  statistics.logits.raw = op->raw;
  // All arguments are checked before anything is written.
  if (const auto status = check_head(*op, cpu)) return status;
  if (const auto status = check_requests(statistics.logits, cpu)) return status;
  const dgemma_logits& logits = statistics.logits;
  for (int64_t first = 0; first < logits.batch; ++first) {
    int64_t end = first;
    while (end < logits.batch && is_active(logits, end)) ++end;
    if (end == first) continue;
    if (const auto status = multiply(*op, first, end, cpu)) return status;
    first = end;
  }
  return dgemma_cpu_vocabulary_statistics(&statistics, cpu);
}
