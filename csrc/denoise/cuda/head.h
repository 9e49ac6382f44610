// The vocabulary head in CUDA: the product of a vocabulary tile, and in its epilogue the rounding,
// the one store of the raw logits and the tile's statistics.
#pragma once

#include "denoise/cuda/plan_head.h"
#include "dgemma/vocabulary_head.h"

namespace dgemma {

namespace device {
struct bfloat16;
}

struct Head {
  Logits logits;  // raw is what the kernel writes
  const device::bfloat16 *hidden, *embedding;
  device::bfloat16* raw;
  float *tile_max, *tile_sum;
  TileParts parts;
  int32_t hidden_size;
};

const char* launch_head_sm80_bf16(const Head& head, void* stream);
const char* launch_head_sm90_bf16(const HeadPlan& plan, const Head& head, void* stream);

}  // namespace dgemma
