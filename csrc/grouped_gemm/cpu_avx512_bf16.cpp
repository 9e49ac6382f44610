#include "grouped_gemm/cpu_kernel.h"

namespace dgemma {

const MoeKernels kMoeKernelsAvx512Bf16[2] = DGEMMA_MOE_KERNELS;

}  // namespace dgemma
