// The C entry points with weights and activations in FP8 for CUDA: argument checks, the passes over
// tokens, the six launches of each.
#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/cuda/quantize_rows.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

using Launch = const char* (*)(const MoeFp8Plan&, const MoeFp8Pass&, void* stream);
struct Kernels {
  Launch gate_up, down;
};

// The kernels that this build has for a GPU (cmake/Cuda.cmake), or null twice.
Kernels find_kernels([[maybe_unused]] const Gpu& gpu) {
#if defined(DGEMMA_WITH_SM90)
  if (gpu.path == CudaPath::kSm90) return {launch_gate_up_sm90_fp8, launch_down_sm90_fp8};
#endif
  // 9.0 and 10.0 take mma.sync of e4m3 too, but nvcc makes float16 products of it there.
#if defined(DGEMMA_WITH_SM89)
  if (gpu.compute_capability == 89) return {launch_gate_up_sm89_fp8, launch_down_sm89_fp8};
#endif
#if defined(DGEMMA_WITH_SM120)
  if (gpu.compute_capability / 10 == 12) return {launch_gate_up_sm89_fp8, launch_down_sm89_fp8};
#endif
  return {};
}

MoeFp8Pass make_pass(const dgemma_moe_ffn_quantized& op, const MoeFp8Plan& plan, int64_t token) {
  uint8_t* workspace = static_cast<uint8_t*>(op.ffn.workspace);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(workspace + at); };
  return {.ffn = make_moe_cuda_pass(op.ffn, plan.ffn, token),
          .gate_up = make_quantized_matrix(op.gate_up, op.ffn.hidden_size),
          .down = make_quantized_matrix(op.down, op.ffn.expert_size),
          .input = workspace + plan.input,
          .input_scales = floats(plan.input_scales),
          .activations = workspace + plan.activations,
          .activation_scales = floats(plan.activation_scales)};
}

// Returns null or the error's text.
const char* run_pass(const Kernels& kernels, const MoeFp8Plan& plan, const MoeFp8Pass& pass,
                     void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const QuantizeRows input = {.input = ffn.input,
                              .output = pass.input,
                              .scales = pass.input_scales,
                              .rows = ffn.tokens,
                              .width = ffn.hidden_size,
                              .filled = nullptr};
  const QuantizeRows activations = {.input = ffn.activations,
                                    .output = pass.activations,
                                    .scales = pass.activation_scales,
                                    .rows = ffn.tokens * ffn.top_k,
                                    .width = ffn.expert_size,
                                    .filled = ffn.tables.first + ffn.tables.experts};
  if (const char* error = launch_sort_pairs(plan.ffn, ffn, stream)) return error;
  if (const char* error = launch_quantize_rows(input, stream)) return error;
  if (const char* error = kernels.gate_up(plan, pass, stream)) return error;
  if (const char* error = launch_quantize_rows(activations, stream)) return error;
  if (const char* error = kernels.down(plan, pass, stream)) return error;
  return launch_combine(plan.ffn, ffn, stream);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_moe_ffn_fp8_workspace(const dgemma_moe_ffn_quantized* op) {
  using namespace dgemma;
  char text[sizeof(dgemma_cuda::message)];
  if (moe_fp8_error(*op, text, sizeof text) != nullptr) return 0;
  return make_moe_fp8_plan(*op, {CudaPath::kSm80, 89, 1}).workspace_bytes;
}

dgemma_status dgemma_cuda_moe_ffn_fp8(const dgemma_moe_ffn_quantized* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  const dgemma_moe_ffn& ffn = op->ffn;
  char text[sizeof(dgemma_cuda::message)];
  if (const char* error = moe_fp8_error(*op, text, sizeof text))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (ffn.tokens == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const Kernels kernels = find_kernels(gpu);
  if (kernels.gate_up == nullptr)
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "this GPU has compute capability %d.%d, wants 8.9, 9.0 or 12.x and a build for it "
                "(9.0 as 90a)",
                gpu.compute_capability / 10, gpu.compute_capability % 10);
  const MoeFp8Plan plan = make_moe_fp8_plan(*op, gpu);
  status =
      check_workspace(operands, ffn.workspace, ffn.workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  for (int64_t token = 0; token < ffn.tokens; token += plan.ffn.tokens_per_pass)
    if (const char* error = run_pass(kernels, plan, make_pass(*op, plan, token), cuda->stream))
      return launched(error, cuda);
  return DGEMMA_OK;
}
