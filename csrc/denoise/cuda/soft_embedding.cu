// The C entry points for CUDA of the soft embedding: checks, and the rounds of six launches.
#include <cmath>

#include "denoise/cuda/entry_points.h"
#include "denoise/cuda/plan_soft_embedding.h"

namespace dgemma {
namespace {

const char* run_round(const SoftPlan& plan, const SoftPass& pass, void* stream) {
  auto product = launch_soft_product_sm80_bf16;
#if defined(DGEMMA_WITH_SM90)
  if (plan.path == CudaPath::kSm90) product = launch_soft_product_sm90_bf16;
#endif
  for (const auto launch : {launch_soft_select_tiles, launch_soft_compact_tiles,
                            launch_soft_probabilities, product, launch_soft_finish})
    if (const char* error = launch(plan, pass, stream)) return error;
  return nullptr;
}

dgemma_status check_soft_embedding(const dgemma_soft_embedding& op, dgemma_cuda* cuda) {
  // The third extent of the product's grid.
  if (op.logits.batch > 65535)
    return fail(cuda, DGEMMA_UNSUPPORTED, "batch: got %lld, wants at most 65535",
                static_cast<long long>(op.logits.batch));
  if (!std::isfinite(op.embedding_scale))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "embedding_scale: got %g, wants a finite number",
                op.embedding_scale);
  if (!(op.tolerance >= 0.0f && op.tolerance < 1.0f))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "tolerance: got %g, wants 0 (dense) or less than 1",
                op.tolerance);
  if (!(op.max_embedding_norm >= 0.0f))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "max_embedding_norm: got %g, wants at least 0",
                op.max_embedding_norm);
  return check_operands(operands_of(op), cuda);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_soft_embedding_workspace(const dgemma_soft_embedding* op) {
  if (dgemma::soft_embedding_error(*op) != nullptr) return 0;
  return dgemma::make_soft_plan(*op, dgemma::CudaPath::kSm80).workspace_bytes;
}

dgemma_status dgemma_cuda_soft_embedding(const dgemma_soft_embedding* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_logits(op->logits, cuda);
  if (status != DGEMMA_OK) return status;
  if (const char* error = soft_embedding_error(*op))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (op->logits.batch == 0 || op->logits.length == 0) return DGEMMA_OK;
  status = check_soft_embedding(*op, cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const SoftPlan plan = make_soft_plan(*op, gpu.path);
  status = check_workspace(operands_of(*op), op->workspace, op->workspace_bytes,
                           plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  status = launched(run_round(plan, make_soft_pass(*op, plan, false), cuda->stream), cuda);
  // Without a tolerance the first round skipped nothing.
  if (status != DGEMMA_OK || op->tolerance == 0.0f) return status;
  return launched(run_round(plan, make_soft_pass(*op, plan, true), cuda->stream), cuda);
}
