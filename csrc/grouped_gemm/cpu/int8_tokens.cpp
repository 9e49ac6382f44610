#include "grouped_gemm/cpu/int8_tokens.h"

#include "common/ceil_divide.h"
#include "cpu/entry.h"

namespace dgemma {
namespace {

// Rows of a task: 22,528 values at the model's width, some microseconds.
constexpr int64_t kRoundedRowsPerTask = 8;

}  // namespace

Int8Tokens take_int8_tokens(Carver* carver, int64_t tokens, int64_t columns) {
  Int8Tokens taken = {};
  taken.codes = carver->take<char>(tokens * int8_stride(columns) * kMostInt8CodeBytes);
  taken.tokens = carver->take<Int8Token>(tokens);
  return taken;
}

bool is_int8(const dgemma_quantized* matrix) {
  return matrix != nullptr && matrix->format == DGEMMA_WEIGHTS_INT8;
}

void round_rows(dgemma_cpu* cpu, Int8RoundTask task, const void* rows, int64_t count,
                int64_t columns, const Int8Tokens& to) {
  run_tasks(cpu, ceil_divide(count, kRoundedRowsPerTask), [&](int64_t index) {
    const int64_t first = index * kRoundedRowsPerTask, end = first + kRoundedRowsPerTask;
    task(rows, first, end < count ? end : count, columns, to);
  });
}

}  // namespace dgemma
