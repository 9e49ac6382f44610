// The C entry points with weights and activations in FP8 for CUDA: argument checks and the passes
// over tokens, of six launches each.
#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

struct Kernels {
  MoeProduct gate_up, down;
};
constexpr Encoding kEncoding = Encoding::kFp8Activations;

// The kernels that this build has for a GPU (cmake/Cuda.cmake), or null twice.
Kernels find_kernels([[maybe_unused]] const Gpu& gpu) {
#if defined(DGEMMA_WITH_SM90)
  if (gpu.path == CudaPath::kSm90)
    return {{kEncoding, launch_gate_up_sm90_fp8}, {kEncoding, launch_down_sm90_fp8}};
#endif
  // 9.0 and 10.0 take mma.sync of e4m3 too, but nvcc makes float16 products of it there.
#if defined(DGEMMA_WITH_SM89)
  if (gpu.compute_capability == 89)
    return {{kEncoding, launch_gate_up_sm89_fp8}, {kEncoding, launch_down_sm89_fp8}};
#endif
#if defined(DGEMMA_WITH_SM120)
  if (gpu.compute_capability / 10 == 12)
    return {{kEncoding, launch_gate_up_sm89_fp8}, {kEncoding, launch_down_sm89_fp8}};
#endif
  return {};
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
  if (kernels.gate_up.launch == nullptr)
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "this GPU has compute capability %d.%d, wants 8.9, 9.0 or 12.x and a build for it "
                "(9.0 as 90a)",
                gpu.compute_capability / 10, gpu.compute_capability % 10);
  const MoeCudaPlan plan = make_moe_fp8_plan(*op, gpu);
  status =
      check_workspace(operands, ffn.workspace, ffn.workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  return run_moe(*op, plan, kernels.gate_up, kernels.down, cuda);
}
