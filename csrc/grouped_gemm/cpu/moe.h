// The interface between cpu/moe.cpp and its kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cpu/int8_tokens.h"
#include "grouped_gemm/cpu/plan.h"

namespace dgemma {

// A pass: tokens whose pairs fit the workspace. Pointers are to the pass's first token.
struct MoePass {
  int64_t hidden_size;
  int64_t expert_size;
  int64_t top_k;
  const void* input;                          // [tokens, hidden_size]
  const int32_t* expert_ids;                  // [tokens, top_k]
  const float* expert_weights;                // [tokens, top_k]
  const void* gate_up;                        // [experts, 2 * expert_size, hidden_size]
  const void* down;                           // [experts, hidden_size, expert_size]
  const dgemma_quantized* quantized_gate_up;  // in place of gate_up and down
  const dgemma_quantized* quantized_down;
  void* output;  // [tokens, hidden_size]
  MoePlan plan;
  void* activations;  // [pairs in plan order, expert_size], dtype
  float* products;    // [tokens, top_k, hidden_size]; slots with id -1 are never touched
  Int8Tokens
      rounded_input;  // of every token, and of every pair in plan order, where weights are INT8
  Int8Tokens rounded_activations;
};

// Weight rows that one task takes at least, of each of gate and up, and of down; and how many tasks
// there are to be where that leaves more rows to a task, if the tokens of an expert are few enough
// to be multiplied with all of them at once. See NOTES.md.
constexpr int64_t kGateUpRowsPerTask = 48;
constexpr int64_t kDownRowsPerTask = 192;
constexpr int64_t kTasks = 256;
constexpr int64_t kTokensOfLongTasks = 64;

struct MoeKernels {
  // activations[:, first_row : end_row] of one group.
  void (*gate_up)(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row);
  // products[..., first_row : end_row] of one group's pairs.
  void (*down)(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row);
  // output[token].
  void (*combine)(const MoePass& pass, int64_t token);
};

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(MoeKernels moe_kernels[2])
DGEMMA_DECLARE_PER_VARIANT(MoeKernels quantized_moe_kernels[2])

}  // namespace dgemma
