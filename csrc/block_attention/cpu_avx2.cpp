// The attention kernel for AVX2 with FMA and F16C.
#include "block_attention/cpu_kernel.h"

namespace dgemma {

const AttentionTable attention_avx2 = attention_table;

}  // namespace dgemma
