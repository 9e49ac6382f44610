// The layer's kernels beside the products. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "layer/cpu/row_kernels.h"

namespace dgemma::DGEMMA_VARIANT {

const LayerKernels layer_kernels[2] = {
    {token_embedding_rows<float>, rms_norm_rows<float>, normalise_heads_rows<float>,
     attention_residual_rows<float>, gelu_product_values<float>, layer_output_rows<float>},
    {token_embedding_rows<bfloat16>, rms_norm_rows<bfloat16>, normalise_heads_rows<bfloat16>,
     attention_residual_rows<bfloat16>, gelu_product_values<bfloat16>, layer_output_rows<bfloat16>},
};

}  // namespace dgemma::DGEMMA_VARIANT
