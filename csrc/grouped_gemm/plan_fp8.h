// How the feed-forward runs with weights and activations in FP8: on Hopper, by the tiles of
// plan_cuda.h, a stage holding 128 columns of e4m3 where it held 64 of bfloat16. Pure host code
// that allocates nothing.
#pragma once

#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/plan_cuda.h"

namespace dgemma {

// Columns in a stage: a row of the widest swizzle. Also how many products are summed before the sum
// is added in fp32 (device/wgmma.h).
constexpr int32_t kFp8Depth = 128;

struct MoeFp8Plan {
  MoeCudaPlan ffn;                        // its workspace comes first
  size_t input, input_scales;             // e4m3 [tokens, hidden_size], float32 [tokens]
  size_t activations, activation_scales;  // e4m3 [pairs, expert_size], float32 [pairs]
  size_t workspace_bytes;
};

// As moe_quantized_problem; both matrices must be FP8.
const char* moe_fp8_problem(const dgemma_moe_ffn_quantized& op, char* text, size_t bytes);

// For a GPU of compute capability 9.0.
MoeFp8Plan make_moe_fp8_plan(const dgemma_moe_ffn_quantized& op, int32_t multiprocessors);

}  // namespace dgemma
