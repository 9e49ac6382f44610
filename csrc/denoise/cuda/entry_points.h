// The CUDA entry points of this family share these checks, and the workspace of the tiles' parts.
#pragma once

#include "cuda/entry.h"
#include "denoise/cuda/kernels.h"
#include "denoise/operands.h"

namespace dgemma {

// True when there is nothing to do; then `status` says whether that is an error.
inline bool is_done(dgemma_status status, int64_t batch, int64_t length) {
  return status != DGEMMA_OK || batch == 0 || length == 0;
}

// Sizes alone.
dgemma_status check_cuda_rows(int64_t batch, int64_t length, int64_t vocabulary, dgemma_cuda* cuda);

// Sizes, dtype and softcap. Temperatures and rows are on the device and cannot be checked.
dgemma_status check_cuda_logits(const dgemma_logits& logits, dgemma_cuda* cuda);

inline TileParts take_tile_parts(WorkspaceParts* workspace, void* base, const dgemma_logits& op) {
  const Logits logits = make_logits(op);
  const int64_t count = static_cast<int64_t>(logits.batch) * logits.length * logits.tiles;
  char* const bytes = static_cast<char*>(base);
  const size_t shifted = workspace->take<float>(count), best = workspace->take<float>(count);
  const size_t index = workspace->take<int32_t>(count);
  return {reinterpret_cast<float*>(bytes + shifted), reinterpret_cast<float*>(bytes + best),
          reinterpret_cast<int32_t*>(bytes + index)};
}

}  // namespace dgemma
