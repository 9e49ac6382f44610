// The attention kernel for AVX-512 with bf16 dot products.
#include "block_attention/cpu_kernel.h"

namespace dgemma {

const AttentionTable attention_avx512_bf16 = attention_table;

}  // namespace dgemma
