// The GPU that the host plays: a Hopper with three multiprocessors, so that a block has several
// units even of little work. See csrc/device/properties.h.
#pragma once

#include <cstdint>

namespace dgemma::device {

struct Properties {
  int32_t compute_capability;
  int32_t multiprocessors;
};

inline const char* get_properties(Properties* properties) {
  *properties = {90, 3};
  return nullptr;
}

}  // namespace dgemma::device
