// The interface between cpu/entry_points.cpp and its kernels, which are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/layer.h"

namespace dgemma {

struct LayerKernels {
  // Rows [first, end): tokens, or values of gelu_product.
  void (*token_embedding)(const dgemma_token_embedding& op, int64_t first, int64_t end);
  void (*rms_norm)(const dgemma_rms_norm& op, int64_t first, int64_t end);
  void (*normalise_heads)(const dgemma_normalise_heads& op, int64_t first, int64_t end);
  void (*attention_residual)(const dgemma_attention_residual& op, int64_t first, int64_t end);
  void (*gelu_product)(const dgemma_gelu_product& op, int64_t first, int64_t end);
  void (*layer_output)(const dgemma_layer_output& op, int64_t first, int64_t end);
};

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(LayerKernels layer_kernels[2])

}  // namespace dgemma
