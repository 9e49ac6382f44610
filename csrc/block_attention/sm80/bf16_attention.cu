// The kernels of sm80/bf16_attention.h for keys in slots.
#include "block_attention/sm80/bf16_attention.h"

namespace dgemma {

const char* launch_attention_sm80_bf16(const AttentionPlan& plan, const Attention& p, int32_t batch,
                                       void* stream) {
  return launch_for_head_dim<false>(plan, p, batch, stream);
}

}  // namespace dgemma
