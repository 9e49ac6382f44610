// The attention kernels. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "block_attention/cpu/attention_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const AttentionKernels attention_kernels = {&attend<float>, &attend<bfloat16>};

}  // namespace dgemma::DGEMMA_VARIANT
