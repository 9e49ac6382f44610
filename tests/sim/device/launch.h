// Launches. See csrc/device/launch.h.
#pragma once

#include <algorithm>

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

}  // namespace dgemma::device

// What g++ writes down for __launch_bounds__ (language.h): where the empty instructions begin.
extern "C" {
extern const uintptr_t __start___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));
extern const uintptr_t __stop___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));
}

namespace sim {

// Of the kernel at this address; 0 where it has none.
inline uint32_t launch_bound(const void* kernel) {
  const auto code = reinterpret_cast<uintptr_t>(kernel);
  for (const uintptr_t* entry = __start___patchable_function_entries;
       entry != __stop___patchable_function_entries; ++entry) {
    if (*entry >= code || code - *entry > 1024 / 32) continue;
    const auto* begin = reinterpret_cast<const uint8_t*>(*entry);
    if (std::count(begin, static_cast<const uint8_t*>(kernel), 0x90) ==  // nop
        static_cast<ptrdiff_t>(code - *entry))
      return static_cast<uint32_t>(32 * (code - *entry));
  }
  return 0;
}

}  // namespace sim

namespace dgemma::device {

// A shape with the line that asks for the launch.
struct LaunchHere {
  LaunchHere(const LaunchShape& shape, SIM_SOURCE) : shape(shape), source(source) {}
  const LaunchShape& shape;
  sim::Source source;
};

// Runs the kernel to its end. Null, or the error's text.
template <typename... Parameters, typename... Arguments>
const char* launch(const LaunchHere& here, void* stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  const LaunchShape& shape = here.shape;
  const auto* function = reinterpret_cast<const void*>(kernel);
  // The arguments lie in the host's memory.
  auto call = [&]() __attribute__((no_sanitize("thread"))) {
    kernel(static_cast<Parameters>(arguments)...);
  };
  return sim::run_grid(
      {shape.grid, shape.threads, shape.shared_bytes, shape.cluster_blocks,
       shape.overlaps_previous_kernel && sim::compute_capability >= 90, function, stream,
       sim::launch_bound(function), here.source},
      [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline void wait_for_previous_kernel() { sim::wait_for_previous_kernel(); }
inline void let_next_kernel_begin() {}

}  // namespace dgemma::device
