// The C entry points of the router for CUDA: argument checks and the two launches.
#include <cmath>

#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/route.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

RouteCall make_route_call(const dgemma_route& op, const RoutePlan& plan) {
  return {.tokens = static_cast<int32_t>(op.tokens),
          .hidden_size = static_cast<int32_t>(op.hidden_size),
          .experts = static_cast<int32_t>(op.experts),
          .top_k = static_cast<int32_t>(op.top_k),
          .k_steps = plan.k_steps,
          .segments = plan.segments,
          .expert_tiles = plan.expert_tiles,
          .epsilon = op.epsilon,
          .hidden_scale = static_cast<float>(std::pow(static_cast<double>(op.hidden_size), -0.5)),
          .input = static_cast<const device::bfloat16*>(op.input),
          .scale = static_cast<const device::bfloat16*>(op.scale),
          .projection = static_cast<const device::bfloat16*>(op.projection),
          .per_expert_scale = static_cast<const device::bfloat16*>(op.per_expert_scale),
          .partial = static_cast<float*>(op.workspace),
          .expert_ids = op.expert_ids,
          .expert_weights = op.expert_weights};
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_route_workspace(const dgemma_route* op) {
  if (dgemma::route_error(*op) != nullptr) return 0;
  return dgemma::make_route_plan(*op).workspace_bytes;
}

dgemma_status dgemma_cuda_route(const dgemma_route* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (const char* error = route_error(*op)) return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (op->tokens == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const RoutePlan plan = make_route_plan(*op);
  status =
      check_workspace(operands, op->workspace, op->workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  const RouteCall call = make_route_call(*op, plan);
  for (const auto launch : {launch_router_scores_sm80_bf16, launch_router_choice})
    if (const char* error = launch(plan, call, cuda->stream)) return launched(error, cuda);
  return DGEMMA_OK;
}
