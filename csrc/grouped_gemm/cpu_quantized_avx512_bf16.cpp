#include "grouped_gemm/cpu_quantized_kernel.h"

namespace dgemma {

const MoeKernels kQuantizedMoeKernelsAvx512Bf16[2] = DGEMMA_QUANTIZED_MOE_KERNELS;
const DenseTask kQuantizedDenseTasksAvx512Bf16[2] = DGEMMA_QUANTIZED_DENSE_TASKS;

}  // namespace dgemma
