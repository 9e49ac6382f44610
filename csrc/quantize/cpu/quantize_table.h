// The kernels that quantize weights. Included once per instruction set: see cpu/variants.h.
#pragma once

#include "quantize/cpu/search_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const QuantizeTask quantize_tasks[4][2] = {
    {quantize_rows<float, Fp8>, quantize_rows<bfloat16, Fp8>},
    {quantize_rows<float, Int4>, quantize_rows<bfloat16, Int4>},
    {quantize_rows<float, Nvfp4>, quantize_rows<bfloat16, Nvfp4>},
    {quantize_rows<float, Int8>, quantize_rows<bfloat16, Int8>},
};

}  // namespace dgemma::DGEMMA_VARIANT
