// The C entry points for CUDA: argument checks, the passes over tokens, the four launches of each.
#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "device/properties.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda.h"

namespace dgemma {
namespace {

constexpr size_t kAlignment = 64;  // what the header asks of the workspace

__attribute__((format(printf, 3, 4))) dgemma_status fail(dgemma_cuda* cuda, dgemma_status status,
                                                         const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(cuda->message, sizeof cuda->message, format, arguments);
  va_end(arguments);
  return status;
}

dgemma_status check_pointers(const dgemma_moe_ffn& op, dgemma_cuda* cuda) {
  const struct {
    const char* name;
    const void* pointer;
    size_t alignment;  // 16 bytes are what one copy moves
  } pointers[] = {{"input", op.input, 16},
                  {"expert_ids", op.expert_ids, alignof(int32_t)},
                  {"expert_weights", op.expert_weights, alignof(float)},
                  {"gate_up", op.gate_up, 16},
                  {"down", op.down, 16},
                  {"output", op.output, 16},
                  {"workspace", op.workspace, kAlignment}};
  for (const auto& [name, pointer, alignment] : pointers)
    if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      return fail(cuda, DGEMMA_INVALID_ARGUMENT, "%s: got %p, wants a multiple of %zu bytes", name,
                  pointer, alignment);
  return DGEMMA_OK;
}

// Null, or CUDA's words.
const char* run_pass(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
#if defined(DGEMMA_WITH_SM90)
  for (const auto launch :
       {launch_sort_pairs, launch_gate_up_sm90_bf16, launch_down_sm90_bf16, launch_combine})
    if (const char* problem = launch(plan, pass, stream)) return problem;
  return nullptr;
#else
  (void)plan, (void)pass, (void)stream;
  return "this build has no kernels for compute capability 9.0";
#endif
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
          .products = reinterpret_cast<float*>(workspace + plan.products)};
}

}  // namespace dgemma

size_t dgemma_cuda_moe_ffn_workspace(const dgemma_moe_ffn* op) {
  if (dgemma::moe_cuda_problem(*op) != nullptr) return 0;
  return dgemma::make_moe_cuda_plan(*op, 1).workspace_bytes;  // the same for any GPU
}

dgemma_status dgemma_cuda_moe_ffn(const dgemma_moe_ffn* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (const char* problem = moe_cuda_problem(*op))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", problem);
  if (op->tokens == 0) return DGEMMA_OK;
  const dgemma_status status = check_pointers(*op, cuda);
  if (status != DGEMMA_OK) return status;

  device::Properties properties = {};
  if (const char* problem = device::get_properties(&properties))
    return fail(cuda, DGEMMA_CUDA_ERROR, "%s", problem);
  if (properties.compute_capability != 90)
    return fail(cuda, DGEMMA_UNSUPPORTED, "this GPU has compute capability %d.%d, wants 9.0",
                properties.compute_capability / 10, properties.compute_capability % 10);
  const MoeCudaPlan plan = make_moe_cuda_plan(*op, properties.multiprocessors);
  if (op->workspace_bytes < plan.workspace_bytes)
    return fail(cuda, DGEMMA_WORKSPACE_TOO_SMALL, "workspace_bytes: got %zu, wants at least %zu",
                op->workspace_bytes, plan.workspace_bytes);
  for (int64_t token = 0; token < op->tokens; token += plan.tokens_per_pass)
    if (const char* problem = run_pass(plan, make_moe_cuda_pass(*op, plan, token), cuda->stream))
      return fail(cuda, DGEMMA_CUDA_ERROR, "%s", problem);
  return DGEMMA_OK;
}
