// The attention kernel for AVX-512 F, BW, DQ and VL.
#include "block_attention/cpu_kernel.h"

namespace dgemma {

const AttentionTable attention_avx512 = attention_table;

}  // namespace dgemma
