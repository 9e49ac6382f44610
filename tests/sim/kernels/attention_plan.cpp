// The plan of the CUDA attention kernels and how it splits a request's keys, callable from Python.
#include <cstdio>
#include <sstream>

#include "block_attention/plan_cuda.h"
#include "block_attention/splits.h"
#include "entry.h"

// Null, or what is wrong with the extents. `text` has room for `bytes`.
SIM_ENTRY attention_plan(const dgemma_block_attention* op, int32_t compute_capability,
                         int64_t (&out)[9], char* text, size_t bytes) {
  using dgemma::CudaPath;
  if (const char* problem = dgemma::attention_cuda_problem(*op)) return problem;
  const CudaPath path = compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80;
  const dgemma::AttentionPlan plan = dgemma::make_attention_plan(*op, path);
  const int64_t numbers[9] = {plan.path == CudaPath::kSm90 ? 90 : 80,
                              plan.rows,
                              plan.keys,
                              plan.row_tiles,
                              plan.splits,
                              plan.partial_tiles,
                              static_cast<int64_t>(plan.partial),
                              static_cast<int64_t>(plan.sums),
                              static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 9; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}
