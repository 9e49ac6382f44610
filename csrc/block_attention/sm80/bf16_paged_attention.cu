// The kernels of sm80/bf16_attention.h for keys in pages.
#include "block_attention/sm80/bf16_attention.h"

namespace dgemma {

const char* launch_paged_attention_sm80_bf16(const AttentionPlan& plan, const Attention& p,
                                             int32_t batch, void* stream) {
  return launch_for_head_dim<true>(plan, p, batch, stream);
}

}  // namespace dgemma
