// A quantized matrix as the CUDA kernels see it, and the declarations of their launches.
#pragma once

#include "common/host_device.h"
#include "grouped_gemm/cuda/dense.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/plan_quantized.h"
#include "grouped_gemm/cuda/quantized_decode.h"

namespace dgemma {

// Pointers are to the device's memory. Rows are counted over all experts.
struct QuantizedMatrix {
  const uint8_t* values;    // [rows, value_bytes]
  const uint8_t* scales;    // [rows, scale_bytes]; not used for FP8
  const float* row_scales;  // [rows / rows_per_scale]: dgemma_quantized's factors, each of a row,
                            // of an expert's matrix or of the whole tensor; null stands for 1
  int32_t rows_per_scale;
  int32_t columns;
  int32_t value_bytes, scale_bytes;  // of a row
  int32_t group_bits;                // a group is 1 << group_bits columns

  // The scale of a row, by which its sums are multiplied. Rows of all experts are below 2^27
  // (1,024 experts, 2 x 65,536 rows): a division in 64 bits is a call.
  DGEMMA_HOST_DEVICE float row_scale(int32_t row) const {
    if (row_scales == nullptr) return 1.0f;
    return row_scales[static_cast<uint32_t>(row) / static_cast<uint32_t>(rows_per_scale)];
  }
};

inline Encoding encoding_of(const dgemma_quantized& matrix) {
  switch (matrix.format) {
    case DGEMMA_WEIGHTS_FP8:
      return Encoding::kFp8;
    case DGEMMA_WEIGHTS_INT4:
      return matrix.scale_dtype == DGEMMA_FLOAT16 ? Encoding::kInt4Float16 : Encoding::kInt4;
    case DGEMMA_WEIGHTS_NVFP4:
      return Encoding::kNvfp4;
    case DGEMMA_WEIGHTS_INT8:
      return Encoding::kInt8;
  }
  __builtin_unreachable();  // quantized_error has refused what is no format
}

QuantizedMatrix make_quantized_matrix(const dgemma_quantized& matrix, int64_t columns);

// Tokens in bytes, as a matrix of INT8 multiplies them and FP8 beside activations in FP8; null
// where they stay bfloat16.
struct ByteRows {
  uint8_t* codes;  // int8 or e4m3 [rows, width]
  float* scales;   // [rows]: what a row's products are to be multiplied by
};

struct MoeQuantizedPass {
  MoeCudaPass ffn;  // its gate_up and down are null
  QuantizedMatrix gate_up, down;
  Encoding gate_up_encoding, down_encoding;
  ByteRows input;        // of the tokens
  ByteRows activations;  // of the pairs, in sorted order
};

struct DenseQuantizedCall {
  DenseCall dense;  // its weight is null
  QuantizedMatrix weight;
  Encoding encoding;
  ByteRows input;
  int32_t* partial;  // of INT8, in place of dense.partial
};

// What multiplies one of a call's matrices: tokens that it wants in bytes are rounded in front.
struct MoeProduct {
  Encoding encoding;
  const char* (*launch)(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream);
};

// Enqueues the passes of a call, of four launches each and one for each rounding.
dgemma_status run_moe(const dgemma_moe_ffn_quantized& op, const MoeCudaPlan& plan,
                      const MoeProduct& gate_up, const MoeProduct& down, dgemma_cuda* cuda);

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
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
const char* launch_gate_up_sm80_int8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                     void* stream);
const char* launch_down_sm80_int8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                  void* stream);
const char* launch_dense_sm80_int8(const DensePlan& plan, const DenseQuantizedCall& call,
                                   void* stream);
const char* launch_sum_int8_segments(const DensePlan& plan, const DenseQuantizedCall& call,
                                     void* stream);

// Calls launch<encoding, token tile>() with one of these token tiles, the last of them for any
// other.
template <Encoding kEncoding, int kTile, int... kLargerTiles, typename Launch>
const char* launch_tile(int32_t token_tile, const Launch& launch) {
  if constexpr (sizeof...(kLargerTiles) > 0)
    if (token_tile != kTile) return launch_tile<kEncoding, kLargerTiles...>(token_tile, launch);
  return launch.template operator()<kEncoding, kTile>();
}

// The kernels of sm80/ that decode weights.
template <typename Launch>
const char* launch_encoding_sm80(Encoding encoding, int32_t token_tile, const Launch& launch) {
  switch (encoding) {
    case Encoding::kFp8:
      return launch_tile<Encoding::kFp8, 32, 64>(token_tile, launch);
    case Encoding::kInt4:
      return launch_tile<Encoding::kInt4, 32, 64>(token_tile, launch);
    case Encoding::kInt4Float16:
      return launch_tile<Encoding::kInt4Float16, 32, 64>(token_tile, launch);
    case Encoding::kNvfp4:
      return launch_tile<Encoding::kNvfp4, 32, 64>(token_tile, launch);
    case Encoding::kFp8Activations:
    case Encoding::kInt8:
      break;
  }
  return "the kernels that decode weights take activations in bfloat16";
}

// The kernels of sm90/: the formats of 4 bits.
template <typename Launch>
const char* launch_encoding_sm90(Encoding encoding, int32_t token_tile, const Launch& launch) {
  switch (encoding) {
    case Encoding::kInt4:
      return launch_tile<Encoding::kInt4, 32, 64, 128>(token_tile, launch);
    case Encoding::kInt4Float16:
      return launch_tile<Encoding::kInt4Float16, 32, 64, 128>(token_tile, launch);
    case Encoding::kNvfp4:
      return launch_tile<Encoding::kNvfp4, 32, 64, 128>(token_tile, launch);
    case Encoding::kFp8:
    case Encoding::kFp8Activations:
    case Encoding::kInt8:
      break;
  }
  return "the kernels of sm_90 that decode weights take 4-bit weights alone";
}

}  // namespace dgemma
