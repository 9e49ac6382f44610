#include "grouped_gemm/cpu_kernel.h"

namespace dgemma {

const MoeKernels kMoeKernelsAvx512[2] = DGEMMA_MOE_KERNELS;

}  // namespace dgemma
