#include "grouped_gemm/cpu_dense_kernel.h"

namespace dgemma {

const DenseTask kDenseTasksAvx512[2] = DGEMMA_DENSE_TASKS;

}  // namespace dgemma
