// The kernels of the experts and of a dense projection with quantized weights. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "grouped_gemm/cpu/quantized_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const MoeKernels quantized_moe_kernels[2] = {
    {quantized_gate_up_task<float>, quantized_down_task<float>, combine_task<float>},
    {quantized_gate_up_task<bfloat16>, quantized_down_task<bfloat16>, combine_task<bfloat16>},
};
const DenseTask quantized_dense_tasks[2] = {quantized_dense_task<float>,
                                            quantized_dense_task<bfloat16>};
const Int8RoundTask int8_round_tasks[2] = {int8_round_task<float>, int8_round_task<bfloat16>};

}  // namespace dgemma::DGEMMA_VARIANT
