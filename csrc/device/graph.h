// A CUDA graph that repeats a step until a kernel at the step's end says that it is enough: a
// conditional WHILE node, which came with CUDA 12.4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/language.h"

namespace dgemma::device {

// The handle by which a kernel of the loop's body decides.
using GraphCondition = cudaGraphConditionalHandle;

// The first CUDA release whose driver has WHILE nodes.
constexpr int32_t kLoopsFrom = 12040;

// Sets whether the body runs once more. One thread calls this; the last value counts.
DGEMMA_DEVICE void set_graph_condition(GraphCondition condition, bool again) {
  cudaGraphSetConditional(condition, again ? 1u : 0u);
}

// The CUDA release that the driver serves, 12040 for 12.4; 0 without a driver.
inline int32_t driver_release() {
  int release = 0;
  return cudaDriverGetVersion(&release) == cudaSuccess ? release : 0;
}

// While it lives, calls of this thread that a capture forbids are allowed.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the mode before
};

class WhileGraph {
 public:
  WhileGraph() = default;
  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;
  // The thread may be capturing another graph: Python destroys objects when it collects them.
  ~WhileGraph() {
    const RelaxedCapture relaxed;
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    if (capture_ != nullptr) cudaStreamDestroy(capture_);
  }

  // step: a cudaGraph_t, which is copied; what it works on must stay where it is. end(condition,
  // stream) launches `kernel`, which sets the condition, and returns the launch's error, if any.
  // Returns null or the error's text.
  template <typename End>
  const char* build(void* step, const void* kernel, End end) {
    const char* launch_error = nullptr;
    // Loads the kernel: its first launch is in a capture, where loading may be forbidden.
    cudaFuncAttributes loaded;
    cudaError_t error = cudaFuncGetAttributes(&loaded, kernel);
    if (error == cudaSuccess)
      error = build_graph(static_cast<cudaGraph_t>(step), end, &launch_error);
    if (launch_error != nullptr) return launch_error;
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

  // Enqueues the loop. The body runs at least once.
  const char* launch(void* stream) {
    const cudaError_t error = cudaGraphLaunch(executable_, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

 private:
  template <typename End>
  cudaError_t build_graph(cudaGraph_t step, End end, const char** launch_error) {
    cudaError_t error = cudaGraphCreate(&graph_, 0);
    if (error != cudaSuccess) return error;
    GraphCondition condition = 0;
    error = cudaGraphConditionalHandleCreate(&condition, graph_, 1, cudaGraphCondAssignDefault);
    if (error != cudaSuccess) return error;
    cudaGraphNodeParams loop = {};
    loop.type = cudaGraphNodeTypeConditional;
    loop.conditional.handle = condition;
    loop.conditional.type = cudaGraphCondTypeWhile;
    loop.conditional.size = 1;
    cudaGraphNode_t node = nullptr, body_step = nullptr;
    error = cudaGraphAddNode(&node, graph_, nullptr, nullptr, 0, &loop);
    if (error != cudaSuccess) return error;
    const cudaGraph_t body = loop.conditional.phGraph_out[0];
    error = cudaGraphAddChildGraphNode(&body_step, body, nullptr, 0, step);
    if (error != cudaSuccess) return error;
    // A separate stream, so that nothing but the kernel at the end is captured.
    error = cudaStreamCreateWithFlags(&capture_, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    error = cudaStreamBeginCaptureToGraph(capture_, body, &body_step, nullptr, 1,
                                          cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) return error;
    *launch_error = end(condition, static_cast<void*>(capture_));
    cudaGraph_t captured = nullptr;
    error = cudaStreamEndCapture(capture_, &captured);
    if (error != cudaSuccess || *launch_error != nullptr) return error;
    return cudaGraphInstantiate(&executable_, graph_, 0);
  }

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
  cudaStream_t capture_ = nullptr;
};

}  // namespace dgemma::device
