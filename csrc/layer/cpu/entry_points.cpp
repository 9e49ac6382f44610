// The C entry points on the CPU: checks, then runs of rows as tasks.
#include <cinttypes>
#include <cmath>

#include "common/ceil_divide.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "layer/cpu/kernels.h"
#include "layer/operands.h"

namespace dgemma {
namespace {

// Values of one task: 64 KB of bfloat16, some microseconds of work.
constexpr int64_t kValuesPerTask = 32768;

// Runs `kernel` of the variant over `rows` rows of `width` values.
template <typename Op>
dgemma_status run(const Op& op, void (*LayerKernels::*kernel)(const Op&, int64_t, int64_t),
                  int64_t rows, int64_t width, dgemma_cpu* cpu) {
  dgemma_cpu_variant variant;
  const dgemma_status status = resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  const auto rows_of = DGEMMA_TABLE_OF(variant, layer_kernels)[op.dtype].*kernel;
  const int64_t step = width < kValuesPerTask ? kValuesPerTask / width : 1;
  run_tasks(cpu, ceil_divide(rows, step), [&](int64_t task) {
    const int64_t first = task * step, end = first + step;
    rows_of(op, first, end < rows ? end : rows);
  });
  return DGEMMA_OK;
}

dgemma_status check_epsilon(float epsilon, dgemma_cpu* cpu) {
  if (std::isfinite(epsilon) && epsilon >= 0.0f) return DGEMMA_OK;
  return fail(cpu, DGEMMA_INVALID_ARGUMENT, "epsilon: got %g, wants 0 or a little more", epsilon);
}

// Tensors [tokens, hidden_size] of the op's dtype.
template <typename Op>
dgemma_status check_rows(const Op* op, dgemma_cpu* cpu) {
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status =
          check_sizes({{"tokens", op->tokens, 0}, {"hidden_size", op->hidden_size, 1}}, cpu))
    return status;
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  return check_epsilon(op->epsilon, cpu);
}

dgemma_status check_ids(const dgemma_token_embedding& op, dgemma_cpu* cpu) {
  for (int64_t i = 0; i < op.tokens; ++i)
    if (op.ids[i] < 0 || op.ids[i] >= op.vocabulary)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "ids: got %d at token %" PRId64 ", wants 0 to %" PRId64, op.ids[i], i,
                  op.vocabulary - 1);
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_token_embedding(const dgemma_token_embedding* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_rows(op, cpu)) return status;
  if (const auto status = check_sizes({{"vocabulary", op->vocabulary, 1}}, cpu)) return status;
  if (!std::isfinite(op->scale))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "scale: got %g, wants a finite number", op->scale);
  if (op->tokens == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  if (const auto status = check_ids(*op, cpu)) return status;
  return run(*op, &LayerKernels::token_embedding, op->tokens, op->hidden_size, cpu);
}

dgemma_status dgemma_cpu_rms_norm(const dgemma_rms_norm* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_rows(op, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  return run(*op, &LayerKernels::rms_norm, op->tokens, op->hidden_size, cpu);
}

dgemma_status dgemma_cpu_normalise_heads(const dgemma_normalise_heads* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status = check_sizes({{"tokens", op->tokens, 0},
                                       {"query_heads", op->query_heads, 1, 65536},
                                       {"key_heads", op->key_heads, 1, 65536},
                                       {"head_dim", op->head_dim, 2, 65536}},
                                      cpu))
    return status;
  if (op->head_dim % 2 != 0)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "head_dim: got %" PRId64 ", wants an even number",
                op->head_dim);
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  if (const auto status = check_epsilon(op->epsilon, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  return run(*op, &LayerKernels::normalise_heads, op->tokens,
             (op->query_heads + 2 * op->key_heads) * op->head_dim, cpu);
}

dgemma_status dgemma_cpu_attention_residual(const dgemma_attention_residual* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_rows(op, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  return run(*op, &LayerKernels::attention_residual, op->tokens, op->hidden_size, cpu);
}

dgemma_status dgemma_cpu_gelu_product(const dgemma_gelu_product* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status = check_sizes({{"values", op->values, 0, int64_t{1} << 48}}, cpu))
    return status;
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  if (op->values == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  return run(*op, &LayerKernels::gelu_product, op->values, 1, cpu);
}

dgemma_status dgemma_cpu_layer_output(const dgemma_layer_output* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check_rows(op, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  if (const auto status = check_operands(operands_of(*op), cpu)) return status;
  return run(*op, &LayerKernels::layer_output, op->tokens, op->hidden_size, cpu);
}
