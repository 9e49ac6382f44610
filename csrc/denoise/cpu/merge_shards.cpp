// dgemma_cpu_merge_vocabulary_shards: the statistics of a vocabulary that lies in shards.
#include "denoise/merge_shards.h"

#include "denoise/cpu/checks.h"

namespace dgemma {
namespace {

dgemma_status check(const dgemma_merge_vocabulary_shards& op, dgemma_cpu* cpu) {
  dgemma_status status = check_shards(op, cpu);
  if (status == DGEMMA_OK) status = check_operands(operands_of(op), cpu);
  if (status != DGEMMA_OK) return status;
  return check_uniforms(op.uniforms, op.batch, op.length, op.active, cpu);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_merge_vocabulary_shards(const dgemma_merge_vocabulary_shards* op,
                                                 dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  if (status != DGEMMA_OK) return status;
  for (int64_t b = 0; b < op->batch; ++b) {
    if (op->active != nullptr && op->active[b] == 0) continue;
    for (int64_t i = 0; i < op->length; ++i) dgemma::merge_position(*op, b, i);
  }
  return DGEMMA_OK;
}
