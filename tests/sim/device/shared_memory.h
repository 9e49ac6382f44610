// Shared memory of the block that runs. See csrc/device/shared_memory.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

template <typename Layout>
Layout& shared_memory(SIM_SOURCE) {
  static_assert(alignof(Layout) <= 1024, "dynamic shared memory is aligned to 1,024 bytes");
  return *static_cast<Layout*>(sim::own_shared_memory(sizeof(Layout), source));
}

inline uint32_t shared_address(const void* pointer, SIM_SOURCE) {
  return sim::kSharedWindow + sim::shared_place(pointer, 0, 1, "shared_address", source).offset;
}

}  // namespace dgemma::device
