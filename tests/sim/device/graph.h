// Graphs that repeat a step. On the host a graph is a function with its context, and the loop is
// one. See csrc/device/graph.h.
#pragma once

#include <cstdint>
#include <functional>

#include "device/language.h"

namespace dgemma::device {

// The address of the value, of which a kernel knows as little as of CUDA's handle.
using GraphCondition = uint64_t;

constexpr int32_t kLoopsFrom = 12040;

inline void set_graph_condition(GraphCondition condition, bool again) {
  *reinterpret_cast<uint32_t*>(condition) = again ? 1 : 0;
}

inline int32_t driver_release() { return kLoopsFrom; }

class WhileGraph {
 public:
  // The stand-in for a cudaGraph_t.
  struct Step {
    void (*run)(void* context);
    void* context;
  };

  template <typename End>
  const char* build(void* step, const void* /*kernel*/, End end) {
    step_ = *static_cast<const Step*>(step);
    end_ = end;
    return nullptr;
  }

  const char* launch(void* stream) {
    for (again_ = 1; again_ != 0;) {
      step_.run(step_.context);
      sim::stream_of_calls = stream;  // the step's calls have had theirs
      if (const char* problem = end_(reinterpret_cast<GraphCondition>(&again_), stream))
        return problem;
    }
    return nullptr;
  }

 private:
  Step step_ = {};
  std::function<const char*(GraphCondition, void*)> end_;
  uint32_t again_ = 0;
};

}  // namespace dgemma::device
