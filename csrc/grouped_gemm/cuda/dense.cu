// The C entry points of the dense projection for CUDA: argument checks and the launches.
#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/dense.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

// Returns null or the error's text.
const char* run(const DensePlan& plan, const DenseCall& call, void* stream) {
  auto product = launch_dense_sm80_bf16;
#if defined(DGEMMA_WITH_SM90)
  if (plan.path == CudaPath::kSm90) product = launch_dense_sm90_bf16;
#endif
  if (const char* error = product(plan, call, stream)) return error;
  return plan.apart ? launch_sum_segments(plan, call, stream) : nullptr;
}

}  // namespace

DenseCall make_dense_call(const dgemma_dense& op, const DensePlan& plan) {
  return {.scheduler = {.rows = static_cast<int32_t>(op.rows),
                        .weight_tiles = plan.weight_tiles,
                        .token_tiles = plan.token_tiles,
                        .k_steps = plan.k_steps,
                        .segments = plan.segments,
                        .apart = plan.apart},
          .in_features = static_cast<int32_t>(op.in_features),
          .out_features = static_cast<int32_t>(op.out_features),
          .input = static_cast<const device::bfloat16*>(op.input),
          .weight = static_cast<const device::bfloat16*>(op.weight),
          .output = static_cast<device::bfloat16*>(op.output),
          .partial = static_cast<float*>(op.workspace)};
}

}  // namespace dgemma

size_t dgemma_cuda_dense_workspace(const dgemma_dense* op) {
  if (dgemma::dense_error(*op) != nullptr) return 0;
  return dgemma::make_dense_plan(*op, {dgemma::CudaPath::kSm80, 80, 1}).workspace_bytes;
}

dgemma_status dgemma_cuda_dense(const dgemma_dense* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (const char* error = dense_error(*op)) return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (op->rows == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const DensePlan plan = make_dense_plan(*op, gpu);
  status =
      check_workspace(operands, op->workspace, op->workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  return launched(run(plan, make_dense_call(*op, plan), cuda->stream), cuda);
}
