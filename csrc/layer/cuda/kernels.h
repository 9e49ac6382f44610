// The launches of the kernels between a layer's products. Each returns null or the error's text.
#pragma once

#include "dgemma/layer.h"

namespace dgemma {

// A row's values are in the registers of a block of at most 1,024 threads, eight each.
constexpr int64_t kWidestRow = 8192;
constexpr int64_t kWidestHead = 512;

const char* launch_token_embedding(const dgemma_token_embedding& op, void* stream);
const char* launch_rms_norm(const dgemma_rms_norm& op, void* stream);
const char* launch_normalise_heads(const dgemma_normalise_heads& op, void* stream);
const char* launch_attention_residual(const dgemma_attention_residual& op, void* stream);
const char* launch_gelu_product(const dgemma_gelu_product& op, void* stream);
const char* launch_layer_output(const dgemma_layer_output& op, void* stream);

}  // namespace dgemma
