// The kernel at the end of a denoising step that decides whether another follows, and the graph
// that it is part of.
#include "cuda/graph_loop.h"
#include "device/graph.h"
#include "device/launch.h"

namespace dgemma {
namespace {

// One thread: a batch has at most some tens of rows, and racing writes of a condition are
// undefined. launch() wants whole warps.
constexpr uint32_t kThreads = 32;

__global__ void __launch_bounds__(kThreads)
    loop_condition_kernel(const LoopFlags flags, const device::GraphCondition condition) {
  if (threadIdx.x != 0) return;
  bool again = true;
  for (int32_t row = 0; row < flags.rows; ++row)
    again = again && (flags.slot[row] < 0 || flags.active[row] != 0);
  const int32_t left = *flags.steps_left - 1;
  *flags.steps_left = left;
  device::set_graph_condition(condition, again && left > 0);
}

class Loop final : public GraphLoop {
 public:
  const char* build(void* step, const LoopFlags& flags) {
    const auto end = [flags](device::GraphCondition condition, void* stream) {
      const device::LaunchShape shape = {.threads = kThreads};
      return device::launch(shape, stream, loop_condition_kernel, flags, condition);
    };
    return graph_.build(step, reinterpret_cast<const void*>(loop_condition_kernel), end);
  }
  const char* launch(void* stream) override { return graph_.launch(stream); }

 private:
  device::WhileGraph graph_;
};

}  // namespace

std::unique_ptr<GraphLoop> GraphLoop::make(void* step, const LoopFlags& flags, std::string* error) {
  const int32_t release = device::driver_release();
  if (release < device::kLoopsFrom) {
    *error = release == 0
                 ? "there is no driver"
                 : "the driver serves CUDA " + std::to_string(release / 1000) + "." +
                       std::to_string(release % 1000 / 10) + ", and loops in graphs came with 12.4";
    return nullptr;
  }
  auto loop = std::make_unique<Loop>();
  if (const char* said = loop->build(step, flags)) {
    *error = said;
    return nullptr;
  }
  return loop;
}

}  // namespace dgemma
