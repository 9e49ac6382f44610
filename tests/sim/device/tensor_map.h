// The tensor map: the layout itself. See csrc/device/tensor_map.h.
#pragma once

#include "device/tensor_layout.h"
#include "machine.h"

namespace dgemma::device {

struct TensorMap {
  TensorLayout layout;
};

inline const char* encode_tensor_map(TensorMap* map, const TensorLayout& layout, SIM_SOURCE) {
  map->layout = layout;
  const char* why = tensor_layout_error(layout);
  return why == nullptr ? nullptr : sim::refuse(source, std::string("tensor map: ") + why);
}

}  // namespace dgemma::device
