// Launches. See csrc/device/launch.h.
#pragma once

#include "device/language.h"
#include "kernel_order.h"

namespace dgemma::device {

struct LaunchShape {
  dim3 grid = dim3(1);
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
  uint32_t cluster_blocks = 1;
  bool overlaps_previous_kernel = false;
  uint32_t blocks_at_once = 1;  // nothing here is a matter of time
};

// A shape with the line that asks for the launch.
struct LaunchHere {
  LaunchHere(const LaunchShape& shape, SIM_SOURCE) : shape(shape), source(source) {}
  const LaunchShape& shape;
  sim::Source source;
};

// Runs the kernel to its end. Null, or the error's text.
template <typename... Parameters, typename... Arguments>
const char* launch(const LaunchHere& here, void*, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  const LaunchShape& shape = here.shape;
  // The arguments lie in the host's memory.
  auto call = [&]() __attribute__((no_sanitize("thread"))) {
    kernel(static_cast<Parameters>(arguments)...);
  };
  return sim::run_grid(
      {shape.grid, shape.threads, shape.shared_bytes, shape.cluster_blocks,
       shape.overlaps_previous_kernel && sim::compute_capability >= 90,
       reinterpret_cast<const void*>(kernel), here.source},
      [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline void wait_for_previous_kernel() { sim::wait_for_previous_kernel(); }
inline void let_next_kernel_begin() {}

}  // namespace dgemma::device
