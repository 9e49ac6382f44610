// The arguments of the CUDA kernels with weights and activations in FP8, and the declarations of
// their launches.
#pragma once

#include "grouped_gemm/cuda/plan_fp8.h"
#include "grouped_gemm/cuda/quantized.h"

namespace dgemma {

struct MoeFp8Pass {
  MoeCudaPass ffn;  // its gate_up and down are null
  QuantizedMatrix gate_up, down;
  uint8_t* input;            // e4m3 [tokens, hidden_size]
  float* input_scales;       // [tokens]
  uint8_t* activations;      // e4m3 [pairs, expert_size], in sorted order
  float* activation_scales;  // [pairs]
};

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_gate_up_sm90_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream);
const char* launch_down_sm90_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream);
const char* launch_gate_up_sm89_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream);
const char* launch_down_sm89_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream);

}  // namespace dgemma
