// The CUDA entry points of every family share these: error messages, the GPU at hand, and the
// cutting of a workspace into parts. The twin of cpu/entry.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/operands.h"
#include "dgemma/base.h"

namespace dgemma {

// The alignment of the workspace that the headers ask for, and of each part of it: what cudaMalloc
// aligns to.
constexpr size_t kWorkspaceAlignment = 64;
constexpr size_t kPartAlignment = 256;

// Writes the message ("argument: got this, wants that") and returns the status.
__attribute__((format(printf, 3, 4))) dgemma_status fail(dgemma_cuda* cuda, dgemma_status status,
                                                         const char* format, ...);

// The tensors of a call and its workspace (common/operands.h).
inline dgemma_status check_operands(const OperandList& operands, dgemma_cuda* cuda) {
  return check_operands(operands, Memory::kGpu, {cuda->message, sizeof cuda->message});
}
inline dgemma_status check_workspace(const OperandList& operands, const void* workspace,
                                     size_t bytes, size_t wanted, dgemma_cuda* cuda) {
  return check_workspace(operands, workspace, bytes, wanted, kWorkspaceAlignment,
                         {cuda->message, sizeof cuda->message});
}

// The kernels that a GPU is served by.
enum class CudaPath {
  kSm80,  // mma.sync and cp.async: 8.0 and all that came later
  kSm90,  // wgmma and TMA: 9.0 alone
};

struct Gpu {
  CudaPath path;
  int32_t compute_capability;  // 90 for 9.0
  int32_t multiprocessors;
};

// The GPU that is current in the calling thread; DGEMMA_UNSUPPORTED below compute capability 8.0.
dgemma_status find_gpu(Gpu* gpu, dgemma_cuda* cuda);

// Turns the result of a launch (null, or the error's text) into a status.
dgemma_status launched(const char* error, dgemma_cuda* cuda);

// Waits for all that the stream holds; DGEMMA_CUDA_ERROR with the error's text where a kernel
// failed.
dgemma_status wait_for_stream(dgemma_cuda* cuda);

// Cuts a workspace into parts, as offsets, and counts its size.
struct WorkspaceParts {
  size_t bytes = 0;

  template <typename T>
  size_t take(int64_t count) {
    const size_t begin = bytes;
    bytes += (static_cast<size_t>(count) * sizeof(T) + kPartAlignment - 1) / kPartAlignment *
             kPartAlignment;
    return begin;
  }
};

}  // namespace dgemma
