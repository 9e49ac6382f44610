#include "grouped_gemm/cpu_kernel.h"

namespace dgemma {

const MoeKernels kMoeKernelsScalar[2] = DGEMMA_MOE_KERNELS;

}  // namespace dgemma
