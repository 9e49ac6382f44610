// csrc/device/graph.h over stand-ins for CUDA's runtime: prints the calls in their order, those that
// a capture forbids with the capture mode of the thread. The argument is the call that fails.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>
#include <utility>

// Of the compiler nvcc; the host never calls it.
static inline void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned) {}

#include "device/graph.h"

namespace {

std::string failing;
cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;

cudaError_t called(const char* name) {
  std::printf("%s\n", name);
  return failing == name ? cudaErrorNotSupported : cudaSuccess;
}

cudaError_t destroyed(const char* what) {
  std::printf("destroy %s%s\n", what, mode == cudaStreamCaptureModeRelaxed ? "" : " in a capture");
  return cudaSuccess;
}

template <typename T>
T place(int number) {
  return reinterpret_cast<T>(static_cast<uintptr_t>(number));
}

}  // namespace

extern "C" {

cudaError_t cudaDriverGetVersion(int* release) {
  *release = 13000;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  return called(kernel == place<void*>(7) ? "load the kernel" : "load another kernel");
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = place<cudaGraph_t>(1);
  return called("graph");
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t,
                                             unsigned, unsigned) {
  *handle = 2;
  return called("handle");
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*,
                             const cudaGraphEdgeData*, size_t, cudaGraphNodeParams* node) {
  static cudaGraph_t body = place<cudaGraph_t>(3);
  node->conditional.phGraph_out = &body;
  return called("loop");
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*,
                                       size_t, cudaGraph_t) {
  return called("step");
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = place<cudaStream_t>(4);
  return called("stream");
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  return called("begin");
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return called("end"); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  *executable = place<cudaGraphExec_t>(5);
  return called("instantiate");
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return called("launch"); }
const char* cudaGetErrorString(cudaError_t) { return "not supported"; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* wanted) {
  std::swap(mode, *wanted);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return destroyed("executable"); }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return destroyed("graph"); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return destroyed("stream"); }

}  // extern "C"

int main(int count, char** words) {
  if (count > 1) failing = words[1];
  {
    dgemma::device::WhileGraph loop;
    const char* error =
        loop.build(place<void*>(6), place<void*>(7),
                   [](dgemma::device::GraphCondition, void*) -> const char* {
                     return called("kernel") == cudaSuccess ? nullptr : "no such kernel";
                   });
    if (error == nullptr) error = loop.launch(nullptr);
    if (error != nullptr) std::printf("error: %s\n", error);
  }
  std::printf("%s\n", mode == cudaStreamCaptureModeThreadLocal ? "as before" : "still relaxed");
}
