// The kernels of the experts with weights in the input's dtype. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "grouped_gemm/cpu/moe_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const MoeKernels moe_kernels[2] = {
    {gate_up_task<float>, down_task<float>, combine_task<float>},
    {gate_up_task<bfloat16>, down_task<bfloat16>, combine_task<bfloat16>},
};

}  // namespace dgemma::DGEMMA_VARIANT
