// The dense projection with weights in the input's dtype. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "grouped_gemm/cpu/dense_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const DenseTask dense_tasks[2] = {dense_task<float>, dense_task<bfloat16>};

}  // namespace dgemma::DGEMMA_VARIANT
