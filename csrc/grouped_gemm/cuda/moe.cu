// The C entry points for CUDA: argument checks, the passes over tokens, the four launches of each.
#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

// Returns null or the error's text.
const char* run_pass(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  auto gate_up = launch_gate_up_sm80_bf16;
  auto down = launch_down_sm80_bf16;
#if defined(DGEMMA_WITH_SM90)
  if (plan.path == CudaPath::kSm90) {
    gate_up = launch_gate_up_sm90_bf16;
    down = launch_down_sm90_bf16;
  }
#endif
  for (const auto launch : {launch_sort_pairs, gate_up, down, launch_combine})
    if (const char* error = launch(plan, pass, stream)) return error;
  return nullptr;
}

}  // namespace

MoeCudaPass make_moe_cuda_pass(const dgemma_moe_ffn& op, const MoeCudaPlan& plan,
                               int64_t first_token) {
  const int64_t left = op.tokens - first_token;
  char* workspace = static_cast<char*>(op.workspace);
  const auto integers = [&](size_t at) { return reinterpret_cast<int32_t*>(workspace + at); };
  return {.tokens = static_cast<int32_t>(left < plan.tokens_per_pass ? left : plan.tokens_per_pass),
          .hidden_size = static_cast<int32_t>(op.hidden_size),
          .expert_size = static_cast<int32_t>(op.expert_size),
          .top_k = static_cast<int32_t>(op.top_k),
          .input = static_cast<const device::bfloat16*>(op.input) + first_token * op.hidden_size,
          .expert_ids = op.expert_ids + first_token * op.top_k,
          .expert_weights = op.expert_weights + first_token * op.top_k,
          .gate_up = static_cast<const device::bfloat16*>(op.gate_up),
          .down = static_cast<const device::bfloat16*>(op.down),
          .output = static_cast<device::bfloat16*>(op.output) + first_token * op.hidden_size,
          .tables = {integers(plan.first), integers(plan.tiles_before), integers(plan.pair),
                     static_cast<int32_t>(op.experts)},
          .activations = reinterpret_cast<device::bfloat16*>(workspace + plan.activations),
          .products = reinterpret_cast<float*>(workspace + plan.products),
          .permuted_input = reinterpret_cast<device::bfloat16*>(workspace + plan.permuted_input)};
}

}  // namespace dgemma

size_t dgemma_cuda_moe_ffn_workspace(const dgemma_moe_ffn* op) {
  if (dgemma::moe_cuda_error(*op) != nullptr) return 0;
  return dgemma::make_moe_cuda_plan(*op, {dgemma::CudaPath::kSm80, 80, 1}).workspace_bytes;
}

dgemma_status dgemma_cuda_moe_ffn(const dgemma_moe_ffn* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (const char* error = moe_cuda_error(*op)) return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (op->tokens == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const MoeCudaPlan plan = make_moe_cuda_plan(*op, gpu);
  status =
      check_workspace(operands, op->workspace, op->workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  for (int64_t token = 0; token < op->tokens; token += plan.tokens_per_pass)
    if (const char* error = run_pass(plan, make_moe_cuda_pass(*op, plan, token), cuda->stream))
      return launched(error, cuda);
  return DGEMMA_OK;
}
