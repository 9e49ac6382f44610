// The GPU that the host plays: by default a Hopper with three multiprocessors, so that a block has
// several work tiles even of little work; sim_set_gpu chooses another. See
// csrc/device/properties.h.
#pragma once

#include <cstdint>

#include "machine.h"

namespace dgemma::device {

struct Properties {
  int32_t compute_capability;
  int32_t multiprocessors;
};

inline const char* get_properties(Properties* properties) {
  *properties = {sim::compute_capability, sim::multiprocessors};
  return nullptr;
}

// A launch returns when its kernel has ended.
inline const char* synchronize(void* /*stream*/) { return nullptr; }

}  // namespace dgemma::device
