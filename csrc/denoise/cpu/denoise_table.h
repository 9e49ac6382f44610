// The kernels of the denoise step. Included once per instruction set: see cpu/variants.h.
#pragma once

#include "denoise/cpu/kernels.h"
#include "denoise/cpu/sample_kernel.h"
#include "denoise/cpu/soft_product_kernel.h"
#include "denoise/cpu/statistics_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const DenoiseKernels denoise_kernels = {
    {statistics_row<float>, statistics_row<bfloat16>},
    {sample_row<float>, sample_row<bfloat16>},
    {soft_row<float>, soft_row<bfloat16>},
    {probabilities_row<float>, probabilities_row<bfloat16>},
    {product_strip<float>, product_strip<bfloat16>},
    {write_row<float>, write_row<bfloat16>},
};

}  // namespace dgemma::DGEMMA_VARIANT
