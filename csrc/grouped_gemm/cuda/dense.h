// The arguments of the CUDA kernels of a dense projection, and the declarations of their launches.
#pragma once

#include <cstdint>

#include "device/bfloat16.h"
#include "grouped_gemm/cuda/dense_scheduler.h"
#include "grouped_gemm/cuda/plan_dense.h"

namespace dgemma {

// Sums of segments begin with this: x + -0 is x, for either zero too.
constexpr float kNegativeZero = -0.0f;

// Pointers are to the device's memory.
struct DenseCall {
  DenseTileScheduler scheduler;
  int32_t in_features, out_features;
  const device::bfloat16* input;   // [rows, in_features]
  const device::bfloat16* weight;  // [out_features, in_features]
  device::bfloat16* output;        // [rows, out_features]
  float* partial;                  // [segments, rows, out_features] when apart
};

DenseCall make_dense_call(const dgemma_dense& op, const DensePlan& plan);

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_dense_sm80_bf16(const DensePlan& plan, const DenseCall& call, void* stream);
const char* launch_dense_sm90_bf16(const DensePlan& plan, const DenseCall& call, void* stream);
const char* launch_sum_segments(const DensePlan& plan, const DenseCall& call, void* stream);

}  // namespace dgemma
