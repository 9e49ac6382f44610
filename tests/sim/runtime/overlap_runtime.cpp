// A CUDA runtime that only notes what it is asked: see overlap_gate.cu and residency.cu.
#include <cuda_runtime_api.h>

#include <cstdio>

extern "C" {
int ptx_version, questions, blocks_that_fit, carveouts;

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* gpu) {
  *gpu = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void*) {
  ++questions;
  code->ptxVersion = ptx_version;
  code->binaryVersion = 120;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout && value == 100) ++carveouts;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  ++questions;
  *blocks = blocks_that_fit;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  bool overlap = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    overlap |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  std::printf("%d ", overlap);
  return cudaSuccess;
}
}
