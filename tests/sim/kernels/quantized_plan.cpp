// The plans of the CUDA kernels over quantized weights, what each kernel reads, and how the sm_90
// kernels decode, callable from Python.
#include <cstdio>
#include <sstream>

#include "entry.h"
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/cuda/quantize_rows.h"
#include "grouped_gemm/sm90/quantized_pipeline.h"

extern "C" void sim_statistics(uint64_t (&out)[6]);

namespace {

dgemma::Gpu gpu_of(int32_t compute_capability, int32_t multiprocessors) {
  using dgemma::CudaPath;
  return {compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80, compute_capability,
          multiprocessors};
}

// Word 0 of a stage, of two rows with scales of their own, by column; and for every group of scales
// that a thread has.
template <dgemma::Encoding kEncoding>
void decode(uint32_t word, uint32_t first, uint32_t second, float* out) {
  namespace sm90 = dgemma::moe_sm90_quantized;
  sm90::GroupScale<kEncoding> scale[2][sm90::kGroups<kEncoding>];
  sm90::decode_scales<kEncoding>(first, second, scale);
  for (int row = 0; row < 2; ++row)
    for (int group = 0; group < sm90::kGroups<kEncoding>; ++group, out += 8) {
      uint32_t pair[4];
      sm90::decode_word<kEncoding>(word, scale[row][group], {0x03020100}, pair);
      for (int i = 0; i < 8; ++i) {
        // A step's pairs are positions 0 and 8 on of its 16.
        const int column = dgemma::permuted_column(i / 4 * 16 + i / 2 % 2 * 8 + i % 2);
        const uint32_t bits = i % 2 == 0 ? pair[i / 2] << 16 : pair[i / 2] & 0xffff0000u;
        out[column] = sm90::kSumUnit<kEncoding> * dgemma::device::high_to_float(bits);
      }
    }
}

template <typename Plan>
void write(const Plan& plan, char* text, size_t bytes) {
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
}

}  // namespace

// `text` has room for `bytes`; the plan, or what is wrong with the sizes.
SIM_ENTRY moe_quantized_plan(const dgemma_moe_ffn_quantized* op, int32_t compute_capability,
                             int32_t multiprocessors, char* text, size_t bytes) {
  if (const char* error = dgemma::moe_quantized_error(*op, text, bytes)) return error;
  const dgemma::Gpu gpu = gpu_of(compute_capability, multiprocessors);
  write(dgemma::make_moe_quantized_plan(*op, gpu), text, bytes);
  return nullptr;
}

SIM_ENTRY dense_quantized_plan(const dgemma_dense_quantized* op, int32_t compute_capability,
                               int32_t multiprocessors, char* text, size_t bytes) {
  if (const char* error = dgemma::dense_quantized_error(*op, text, bytes)) return error;
  const dgemma::Gpu gpu = gpu_of(compute_capability, multiprocessors);
  write(dgemma::make_dense_quantized_plan(*op, gpu), text, bytes);
  return nullptr;
}

SIM_ENTRY moe_fp8_plan(const dgemma_moe_ffn_quantized* op, int32_t compute_capability,
                       int32_t multiprocessors, char* text, size_t bytes) {
  if (const char* error = dgemma::moe_fp8_error(*op, text, bytes)) return error;
  write(dgemma::make_moe_fp8_plan(*op, gpu_of(compute_capability, multiprocessors)), text, bytes);
  return nullptr;
}

SIM_ENTRY quantize_rows(const void* input, uint8_t* output, float* scales, int32_t rows,
                        int32_t width) {
  return dgemma::launch_quantize_rows({.input = static_cast<const dgemma::device::bfloat16*>(input),
                                       .output = output,
                                       .scales = scales,
                                       .rows = rows,
                                       .width = width,
                                       .filled = nullptr},
                                      nullptr);
}

SIM_ENTRY quantize_rows_int8(const void* input, uint8_t* output, float* scales, int32_t rows,
                             int32_t width, const int32_t* filled) {
  return dgemma::launch_quantize_rows_int8(
      {.input = static_cast<const dgemma::device::bfloat16*>(input),
       .output = output,
       .scales = scales,
       .rows = rows,
       .width = width,
       .filled = filled},
      nullptr);
}

// `out` has room for 8 values of each row, and for NVFP4 of each of two groups.
SIM_ENTRY decode_sm90(const dgemma_quantized* matrix, uint32_t word, uint32_t first,
                      uint32_t second, float* out) {
  using dgemma::Encoding;
  const Encoding encoding = dgemma::encoding_of(*matrix);
  if (encoding == Encoding::kInt4) decode<Encoding::kInt4>(word, first, second, out);
  if (encoding == Encoding::kInt4Float16) decode<Encoding::kInt4Float16>(word, first, second, out);
  if (encoding == Encoding::kNvfp4) decode<Encoding::kNvfp4>(word, first, second, out);
  return nullptr;
}

// Bytes that the last kernel read by cp.async from global memory.
SIM_ENTRY bytes_copied(uint64_t* out) {
  uint64_t statistics[6];
  sim_statistics(statistics);
  *out = statistics[4];
  return nullptr;
}
