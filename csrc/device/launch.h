// Starting a kernel, and the two ends of programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "device/language.h"

namespace dgemma::device {

struct LaunchShape {
  dim3 grid = dim3(1);                    // blocks; a multiple of cluster_blocks in x
  uint32_t threads = 0;                   // per block, a multiple of 32
  uint32_t shared_bytes = 0;              // dynamic shared memory per block
  uint32_t cluster_blocks = 1;            // along x, at most 8
  bool overlaps_previous_kernel = false;  // may begin before the previous kernel ends: see below
  // Blocks of a multiprocessor that the grid counts on where it divides the work in advance: one
  // that had to wait for another to end would double the time.
  uint32_t blocks_at_once = 1;
};

// Whether a kernel that asks for it may begin before the previous one ends: only where the code
// that runs holds griddepcontrol.wait, that is where it comes from PTX for 9.0 or later. Not the
// GPU decides: what was compiled for older ones alone runs on a newer one without any wait, and
// would read what is not yet written. ptxVersion is the code's, binaryVersion that of the driver's
// compiler. All files are compiled for the same architectures, so one kernel answers for its GPU.
// DGEMMA_PDL=0 in the environment takes overlap out: an error that goes away with it is a missing
// wait.
inline bool can_overlap(const void* kernel) {
  static const bool wanted = [] {
    const char* value = std::getenv("DGEMMA_PDL");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  constexpr int kMostGpus = 64;
  enum Answer : int8_t { kNotAsked, kNo, kYes };
  static std::atomic<Answer> answers[kMostGpus];
  int gpu = 0;
  if (!wanted || cudaGetDevice(&gpu) != cudaSuccess || gpu >= kMostGpus) return false;
  Answer answer = answers[gpu].load(std::memory_order_relaxed);
  if (answer == kNotAsked) {
    cudaFuncAttributes code;
    if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess) return false;
    answer = code.ptxVersion >= 90 ? kYes : kNo;
    answers[gpu].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

// Asks a multiprocessor for as much shared memory as so many blocks may need. With
// DGEMMA_RESIDENCY=1 in the environment, also whether so many fit by what the driver knows of the
// code's registers. Null, or what is wrong.
inline const char* reserve_for_blocks(const LaunchShape& shape, const void* kernel) {
  static const bool asked = [] {
    const char* value = std::getenv("DGEMMA_RESIDENCY");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  cudaError_t error = cudaSuccess;
  if (shape.blocks_at_once > 1)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  int fit = 0;
  if (asked && error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &fit, kernel, static_cast<int>(shape.threads), shape.shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return asked && fit < static_cast<int>(shape.blocks_at_once)
             ? "fewer blocks fit a multiprocessor than the launch counts on"
             : nullptr;
}

// Null on success, else the error's text. Enqueues on `stream` (a cudaStream_t) and does not wait.
template <typename... Parameters, typename... Arguments>
const char* launch(const LaunchShape& shape, void* stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  // Blocks with more than 48 KB of shared memory must ask for it.
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  if (const char* error = reserve_for_blocks(shape, reinterpret_cast<const void*>(kernel)))
    return error;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster_blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster_blocks;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.overlaps_previous_kernel && can_overlap(reinterpret_cast<const void*>(kernel))) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// griddepcontrol.wait: waits until the previous kernels are done and their writes are visible. A
// kernel launched with overlaps_previous_kernel reads nothing that they write, and writes nothing
// that they read, before it. PTX ISA, "Control Flow Instructions: griddepcontrol" (sm_90).
DGEMMA_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// griddepcontrol.launch_dependents: the next kernel may begin once every block has called this or
// ended.
DGEMMA_DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dgemma::device
