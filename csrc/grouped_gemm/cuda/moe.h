// The arguments of the experts' CUDA kernels for one pass, and the declarations of their launches.
#pragma once

#include <cstdint>

#include "device/bfloat16.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"
#include "grouped_gemm/cuda/plan_moe.h"

namespace dgemma {

// The tokens of one pass. Pointers are to the device's memory.
struct MoeCudaPass {
  int32_t tokens, hidden_size, expert_size, top_k;
  const device::bfloat16* input;    // [tokens, hidden_size]
  const int32_t* expert_ids;        // [tokens, top_k]
  const float* expert_weights;      // [tokens, top_k]
  const device::bfloat16* gate_up;  // [experts, 2 * expert_size, hidden_size]
  const device::bfloat16* down;     // [experts, hidden_size, expert_size]
  device::bfloat16* output;         // [tokens, hidden_size]
  MoeTables tables;
  device::bfloat16* activations;  // [pairs, expert_size], in sorted order
  float* products;                // [pairs, hidden_size], row token * top_k + slot
  // [tokens, permuted width] where the plan has blocks that permute the input; then rows of
  // `activations` have a permuted width too.
  device::bfloat16* permuted_input;
};

// The pass that begins with this token.
MoeCudaPass make_moe_cuda_pass(const dgemma_moe_ffn& op, const MoeCudaPlan& plan,
                               int64_t first_token);

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_sort_pairs(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream);
const char* launch_gate_up_sm90_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass,
                                     void* stream);
const char* launch_down_sm90_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream);
const char* launch_gate_up_sm80_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass,
                                     void* stream);
const char* launch_down_sm80_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream);
const char* launch_combine(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream);

}  // namespace dgemma
