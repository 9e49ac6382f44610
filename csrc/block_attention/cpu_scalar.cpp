// The attention kernel for any processor.
#include "block_attention/cpu_kernel.h"

namespace dgemma {

const AttentionTable attention_scalar = attention_table;

}  // namespace dgemma
