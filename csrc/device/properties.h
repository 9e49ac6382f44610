// The host's questions to the GPU that is current in the calling thread: what a launch plan must
// know, and waiting.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dgemma::device {

struct Properties {
  int32_t compute_capability;  // 90 for 9.0
  int32_t multiprocessors;
};

// Null on success, else the error's text.
inline const char* get_properties(Properties* properties) {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  *properties = {10 * major + minor, multiprocessors};
  return nullptr;
}

// Waits for a stream, a cudaStream_t. Null, or the text of its error.
inline const char* synchronize(void* stream) {
  const cudaError_t error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dgemma::device
