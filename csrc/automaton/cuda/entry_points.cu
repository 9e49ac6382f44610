// The C entry points for CUDA: checks of what the host knows, then the launches. An arena, its
// descriptors and other values are on the device and cannot be checked.
#include <cinttypes>

#include "automaton/cuda/kernels.h"
#include "automaton/operands.h"
#include "denoise/cuda/entry_points.h"

namespace dgemma {
namespace {

constexpr int64_t kMostStates = 1 << 20;

dgemma_status check_most(const char* name, int64_t got, int64_t most, dgemma_cuda* cuda) {
  if (got >= 1 && got <= most) return DGEMMA_OK;
  return fail(cuda, got < 1 ? DGEMMA_INVALID_ARGUMENT : DGEMMA_UNSUPPORTED,
              "%s: got %" PRId64 ", wants 1 to %" PRId64, name, got, most);
}

dgemma_status check_arena(int64_t words, dgemma_cuda* cuda) {
  if (words >= 0) return DGEMMA_OK;
  return fail(cuda, DGEMMA_INVALID_ARGUMENT, "arena_words: got %" PRId64 ", wants at least 0",
              words);
}

dgemma_status check(const dgemma_constrain& op, dgemma_cuda* cuda) {
  dgemma_status status = check_cuda_rows(op.batch, op.length, 1, cuda);
  if (status == DGEMMA_OK && op.length == 0)
    status = fail(cuda, DGEMMA_INVALID_ARGUMENT, "length: got 0, wants at least 1");
  if (status == DGEMMA_OK) status = check_arena(op.arena_words, cuda);
  if (status == DGEMMA_OK)
    status = check_most("most_classes", op.most_classes, kMostClassesOnGpu, cuda);
  if (status == DGEMMA_OK) status = check_most("most_states", op.most_states, kMostStates, cuda);
  if (status == DGEMMA_OK) status = check_most("most_sets", op.most_sets, INT32_MAX, cuda);
  return status;
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cuda_class_statistics(const dgemma_class_statistics* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_logits(op->logits, cuda);
  if (status == DGEMMA_OK) status = check_arena(op->arena_words, cuda);
  if (status == DGEMMA_OK)
    status = check_most("most_classes", op->most_classes, kMostClassesOnGpu, cuda);
  if (is_done(status, op->logits.batch, op->logits.length)) return status;
  status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_class_statistics(*op, cuda->stream), cuda);
}

size_t dgemma_cuda_constrain_workspace(const dgemma_constrain* op) {
  return op->batch < 1 || op->length < 1 ? 0 : dgemma::make_chain_plan(*op).workspace_bytes;
}

dgemma_status dgemma_cuda_constrain(const dgemma_constrain* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check(*op, cuda);
  if (is_done(status, op->batch, op->length)) return status;
  const OperandList operands = operands_of(*op);
  status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;
  const ChainPlan plan = make_chain_plan(*op);
  status =
      check_workspace(operands, op->workspace, op->workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const Chain chain = make_chain(*op, plan);
  status = launched(launch_masses(chain, cuda->stream), cuda);
  if (status == DGEMMA_OK) status = launched(launch_passes(plan, chain, cuda->stream), cuda);
  return status != DGEMMA_OK ? status : launched(launch_key(plan, chain, cuda->stream), cuda);
}

size_t dgemma_cuda_sample_class_workspace(const dgemma_sample_class* op) {
  if (op->logits.batch < 1 || op->logits.length < 1 || op->logits.vocabulary < 1) return 0;
  const int64_t tiles = dgemma::ceil_divide(op->logits.vocabulary, DGEMMA_VOCABULARY_TILE);
  return static_cast<size_t>(op->logits.batch * op->logits.length * tiles) * 2 * sizeof(float);
}

dgemma_status dgemma_cuda_sample_class(const dgemma_sample_class* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_logits(op->logits, cuda);
  if (status == DGEMMA_OK) status = check_arena(op->arena_words, cuda);
  if (is_done(status, op->logits.batch, op->logits.length)) return status;
  const OperandList operands = operands_of(*op);
  status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;
  status = check_workspace(operands, op->workspace, op->workspace_bytes,
                           dgemma_cuda_sample_class_workspace(op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_sample_class(*op, cuda->stream), cuda);
}
