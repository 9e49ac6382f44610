// The mark of a function that runs on the host and in kernels alike, so that a test can walk on the
// host what a kernel does on the device.
#pragma once

#if defined(__CUDACC__)
#define DGEMMA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DGEMMA_HOST_DEVICE inline
#endif
