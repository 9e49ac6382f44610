/* The few functions of CUDA's runtime that a C host uses, over the host's memory: for a program that
 * is linked with the CUDA kernels run by the test bed. Memory is aligned as cudaMalloc's and poisoned. */
#ifndef SIM_CUDA_RUNTIME_API_H_
#define SIM_CUDA_RUNTIME_API_H_

#include <stdlib.h>
#include <string.h>

typedef enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 } cudaError_t;
typedef enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 } cudaMemcpyKind;
typedef struct sim_stream* cudaStream_t;

static inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "out of memory";
}
static inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const size_t rounded = (bytes + 255) / 256 * 256;
  *memory = aligned_alloc(256, rounded);
  if (*memory == NULL) return cudaErrorMemoryAllocation;
  memset(*memory, 0xff, rounded);
  return cudaSuccess;
}
static inline cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
static inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                          cudaStream_t stream) {
  (void)kind;
  (void)stream;
  memcpy(to, from, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = NULL;
  return cudaSuccess;
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  (void)stream;
  return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  (void)stream;
  return cudaSuccess;
}

#endif
