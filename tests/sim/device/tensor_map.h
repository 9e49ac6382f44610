// The tensor map: the layout itself. See csrc/device/tensor_map.h.
#pragma once

#include "device/tensor_layout.h"

namespace dgemma::device {

struct TensorMap {
  TensorLayout layout;
};

inline const char* encode_tensor_map(TensorMap* map, const TensorLayout& layout) {
  map->layout = layout;
  return tensor_layout_error(layout);
}

}  // namespace dgemma::device
