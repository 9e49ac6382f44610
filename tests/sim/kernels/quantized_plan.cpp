// The plans of the CUDA kernels over quantized weights and what each kernel reads, callable from
// Python.
#include <cstdio>
#include <sstream>

#include "entry.h"
#include "grouped_gemm/cuda_fp8.h"
#include "grouped_gemm/quantize_rows.h"

extern "C" void sim_statistics(uint64_t (&out)[6]);

namespace {

dgemma::Gpu gpu_of(int32_t compute_capability, int32_t multiprocessors) {
  using dgemma::CudaPath;
  return {compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80, compute_capability,
          multiprocessors};
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
  if (const char* problem = dgemma::moe_quantized_problem(*op, text, bytes)) return problem;
  const dgemma::Gpu gpu = gpu_of(compute_capability, multiprocessors);
  write(dgemma::make_moe_quantized_plan(*op, gpu), text, bytes);
  return nullptr;
}

SIM_ENTRY dense_quantized_plan(const dgemma_dense_quantized* op, int32_t compute_capability,
                               int32_t multiprocessors, char* text, size_t bytes) {
  if (const char* problem = dgemma::dense_quantized_problem(*op, text, bytes)) return problem;
  const dgemma::Gpu gpu = gpu_of(compute_capability, multiprocessors);
  write(dgemma::make_dense_quantized_plan(*op, gpu), text, bytes);
  return nullptr;
}

SIM_ENTRY moe_fp8_plan(const dgemma_moe_ffn_quantized* op, int32_t multiprocessors, char* text,
                       size_t bytes) {
  if (const char* problem = dgemma::moe_fp8_problem(*op, text, bytes)) return problem;
  write(dgemma::make_moe_fp8_plan(*op, multiprocessors).ffn, text, bytes);
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
                                      true, nullptr);
}

// Bytes that the last kernel read by cp.async from global memory.
SIM_ENTRY bytes_copied(uint64_t* out) {
  uint64_t statistics[6];
  sim_statistics(statistics);
  *out = statistics[4];
  return nullptr;
}
