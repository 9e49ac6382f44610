// What the CUDA kernels over quantized weights share: a matrix as they see it, and their launches.
#pragma once

#include "grouped_gemm/cuda/dense.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/plan_quantized.h"
#include "grouped_gemm/cuda/quantized_decode.h"

namespace dgemma {

// Pointers are to the device's memory. Rows are counted over all experts.
struct QuantizedMatrix {
  const uint8_t* values;  // [rows, value_bytes]
  const uint8_t* scales;  // [rows, scale_bytes]; not used for FP8
  const float* factors;   // [rows / rows_per_factor]; null stands for 1
  int32_t rows_per_factor;
  int32_t columns;
  int32_t value_bytes, scale_bytes;  // of a row
  int32_t group_bits;                // a group is 1 << group_bits columns
};

inline Encoding encoding_of(const dgemma_quantized& matrix) {
  if (matrix.format == DGEMMA_WEIGHTS_FP8) return Encoding::kFp8;
  if (matrix.format == DGEMMA_WEIGHTS_NVFP4) return Encoding::kNvfp4;
  return matrix.scale_dtype == DGEMMA_FLOAT16 ? Encoding::kInt4Float16 : Encoding::kInt4;
}

QuantizedMatrix make_quantized_matrix(const dgemma_quantized& matrix, int64_t columns);
// The three are the names to give in a message: "gate_up.values" and so on.
dgemma_status check_quantized(const dgemma_quantized& matrix, const char* values,
                              const char* scales, const char* factors, dgemma_cuda* cuda);

struct MoeQuantizedPass {
  MoeCudaPass ffn;  // its gate_up and down are null
  QuantizedMatrix gate_up, down;
  Encoding gate_up_encoding, down_encoding;
};

struct DenseQuantizedCall {
  DenseCall dense;  // its weight is null
  QuantizedMatrix weight;
  Encoding encoding;
};

// Each enqueues one kernel on `stream`, a cudaStream_t. Null, or CUDA's words.
const char* launch_gate_up_sm80_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                          void* stream);
const char* launch_down_sm80_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                       void* stream);
const char* launch_gate_up_sm90_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                          void* stream);
const char* launch_down_sm90_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                       void* stream);
const char* launch_dense_sm80_quantized(const DensePlan& plan, const DenseQuantizedCall& call,
                                        void* stream);

// Calls launch<encoding, token tile>() of those that there is code for.
#define DGEMMA_LAUNCH_QUANTIZED(encoding, token_tile, launch, ...)                          \
  (encoding == Encoding::kFp8                                                               \
       ? (token_tile == 32 ? launch<Encoding::kFp8, 32> : launch<Encoding::kFp8, 64>)       \
   : encoding == Encoding::kInt4                                                            \
       ? (token_tile == 32 ? launch<Encoding::kInt4, 32> : launch<Encoding::kInt4, 64>)     \
   : encoding == Encoding::kInt4Float16                                                     \
       ? (token_tile == 32 ? launch<Encoding::kInt4Float16, 32>                             \
                           : launch<Encoding::kInt4Float16, 64>)                            \
       : (token_tile == 32 ? launch<Encoding::kNvfp4, 32> : launch<Encoding::kNvfp4, 64>))( \
      __VA_ARGS__)

// The same of the kernels for sm_90, which have no FP8.
#define DGEMMA_LAUNCH_QUANTIZED_90(encoding, token_tile, launch, ...)                        \
  (encoding == Encoding::kInt4                                                               \
       ? (token_tile == 64 ? launch<Encoding::kInt4, 64> : launch<Encoding::kInt4, 128>)     \
   : encoding == Encoding::kInt4Float16                                                      \
       ? (token_tile == 64 ? launch<Encoding::kInt4Float16, 64>                              \
                           : launch<Encoding::kInt4Float16, 128>)                            \
       : (token_tile == 64 ? launch<Encoding::kNvfp4, 64> : launch<Encoding::kNvfp4, 128>))( \
      __VA_ARGS__)

}  // namespace dgemma
