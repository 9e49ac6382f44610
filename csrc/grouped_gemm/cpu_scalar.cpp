#include "grouped_gemm/cpu_kernel.h"

namespace dgemma {

const MoeKernels kMoeKernelsScalar[2] = DGEMMA_MOE_KERNELS;
const MoeKernels kQuantizedMoeKernelsScalar[2] = DGEMMA_QUANTIZED_MOE_KERNELS;

}  // namespace dgemma
