// The arguments of the router's two kernels, and the declarations of their launches.
#pragma once

#include <cstdint>

#include "device/bfloat16.h"
#include "grouped_gemm/cuda/plan_route.h"

namespace dgemma {

// Pointers are to the device's memory.
struct RouteCall {
  int32_t tokens, hidden_size, experts, top_k;
  int32_t k_steps, segments, expert_tiles;
  float epsilon;
  float hidden_scale;                        // hidden_size^-1/2
  const device::bfloat16* input;             // [tokens, hidden_size]
  const device::bfloat16* scale;             // [hidden_size]
  const device::bfloat16* projection;        // [experts, hidden_size]
  const device::bfloat16* per_expert_scale;  // [experts]
  float* partial;                            // [segments, tokens, experts]
  int32_t* expert_ids;                       // [tokens, top_k]
  float* expert_weights;                     // [tokens, top_k]
};

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_router_scores_sm80_bf16(const RoutePlan& plan, const RouteCall& call,
                                           void* stream);
const char* launch_router_choice(const RoutePlan& plan, const RouteCall& call, void* stream);

}  // namespace dgemma
