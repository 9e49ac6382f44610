// dgemma_cpu_noise: uniform tokens where the canvas is not to be kept.
#include "denoise/cpu/noise.h"

#include "denoise/cpu/checks.h"
#include "device/philox.h"

namespace dgemma {
namespace {

dgemma_status check(const dgemma_noise& op, dgemma_cpu* cpu) {
  dgemma_status status = check_sizes(op.batch, op.length, op.vocabulary, cpu);
  if (status == DGEMMA_OK) status = check_operands(operands_of(op), cpu);
  if (status != DGEMMA_OK) return status;
  if (op.purpose < DGEMMA_PURPOSE_INITIAL_NOISE || op.purpose > DGEMMA_PURPOSE_RENOISE)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "purpose: got %d, wants 0 (initial noise), 1 (sample) or 2 (renoise)",
                static_cast<int>(op.purpose));
  status = check_allowed(op.allowed, op.batch, op.length, op.vocabulary, op.active, cpu);
  if (status != DGEMMA_OK) return status;
  return check_uniforms(op.uniforms, op.batch, op.length, op.active, cpu);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_noise(const dgemma_noise* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  if (status != DGEMMA_OK) return status;
  dgemma::AllowedCount counts(op->vocabulary);
  for (int64_t b = 0; b < op->batch; ++b) {
    if (op->active != nullptr && op->active[b] == 0) continue;
    for (int64_t i = 0; i < op->length; ++i) {
      const int64_t row = b * op->length + i;
      if (op->keep != nullptr && op->keep[row] != 0) continue;
      const double uniform =
          op->uniforms != nullptr
              ? op->uniforms[row]
              : dgemma::draw_uniform(op->seed[b], op->canvas_index[b], op->step[b], i, op->purpose);
      op->tokens[row] = dgemma::uniform_token(
          dgemma::allowed_bits(op->allowed, op->vocabulary, row), op->vocabulary, uniform, counts);
    }
  }
  return DGEMMA_OK;
}
