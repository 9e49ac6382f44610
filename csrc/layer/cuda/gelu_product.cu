// gelu_tanh(gate) * up, eight values a thread; the activation is rounded before the product.
#include "common/ceil_divide.h"
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;

struct Product {
  const bfloat16 *gate, *up;
  bfloat16* output;
  int64_t values;
};

// The tanh form, in fp32 and in the order of torch's CUDA kernel (aten/src/ATen/native/cuda/
// ActivationGeluKernel.cu): x cubed, then the fused multiply-add. The experts' epilogue has a
// quicker one (grouped_gemm/cuda/gelu.h); here the reads are what takes the time.
DGEMMA_DEVICE float gelu(float x) {
  constexpr float kSqrtTwoOverPi = 0.79788456080286536f, kCubic = 0.044715f;
  return 0.5f * x * (1.0f + tanhf(kSqrtTwoOverPi * fmaf(kCubic, x * x * x, x)));
}

DGEMMA_DEVICE uint32_t of_pair(uint32_t gate, uint32_t up) {
  return device::pack_bfloat16(
      rounded(gelu(device::low_to_float(gate))) * device::low_to_float(up),
      rounded(gelu(device::high_to_float(gate))) * device::high_to_float(up));
}

__global__ void __launch_bounds__(kThreads) gelu_product(const Product p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t at = 8 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (at >= p.values) return;
  const uint4 gate = *reinterpret_cast<const uint4*>(p.gate + at);
  const uint4 up = *reinterpret_cast<const uint4*>(p.up + at);
  *reinterpret_cast<uint4*>(p.output + at) = {of_pair(gate.x, up.x), of_pair(gate.y, up.y),
                                              of_pair(gate.z, up.z), of_pair(gate.w, up.w)};
}

}  // namespace

const char* launch_gelu_product(const dgemma_gelu_product& op, void* stream) {
  const Product p = {.gate = static_cast<const bfloat16*>(op.gate),
                     .up = static_cast<const bfloat16*>(op.up),
                     .output = static_cast<bfloat16*>(op.output),
                     .values = op.values};
  const int64_t threads = op.values / 8;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(threads, kThreads))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, gelu_product, p);
}

}  // namespace dgemma
