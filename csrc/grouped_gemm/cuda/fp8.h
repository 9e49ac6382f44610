// The declarations of the launches with weights and activations in FP8.
#pragma once

#include "grouped_gemm/cuda/plan_fp8.h"
#include "grouped_gemm/cuda/quantized.h"

namespace dgemma {

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_gate_up_sm90_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                    void* stream);
const char* launch_down_sm90_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                 void* stream);
const char* launch_gate_up_sm89_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                    void* stream);
const char* launch_down_sm89_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                 void* stream);

}  // namespace dgemma
