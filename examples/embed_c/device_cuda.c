#include <cuda_runtime_api.h>

#include "common.h"
#include "device.h"

static dgemma_cuda gpu;

static void check(cudaError_t error) {
  if (error != cudaSuccess) die("CUDA: %s", cudaGetErrorString(error));
}

static void* allocate_there(size_t bytes) {
  void* memory;
  check(cudaMalloc(&memory, bytes > 0 ? bytes : 1));
  check(cudaMemset(memory, 0, bytes));
  return memory;
}
static void release_there(void* memory) { check(cudaFree(memory)); }

static void copy_in(void* to, const void* host, size_t bytes) {
  check(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, gpu.stream));
}
static void copy_out(void* host, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
  check(cudaStreamSynchronize(gpu.stream));
}

static void close_stream(void) { check(cudaStreamDestroy(gpu.stream)); }

#define FORWARD(function, op)                                                \
  static dgemma_status run_##function(const dgemma_##op* o, void* context) { \
    return dgemma_cuda_##function(o, context);                               \
  }
EMBED_OPERATIONS(FORWARD)

device device_cuda(void) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  gpu.stream = stream;
  return (device){.name = "cuda",
                  .context = &gpu,
                  .message = gpu.message,
                  .allocate = allocate_there,
                  .release = release_there,
                  .write = copy_in,
                  .read = copy_out,
                  .close = close_stream,
#define ENTRY(function, op) .function = run_##function,
                  EMBED_OPERATIONS(ENTRY)
#undef ENTRY
#define ENTRY(function, op) .function##_workspace = dgemma_cuda_##function##_workspace,
                      EMBED_WORKSPACES(ENTRY)
#undef ENTRY
  };
}
