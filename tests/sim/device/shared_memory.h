// Shared memory of the block that runs. See csrc/device/shared_memory.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

template <typename Layout>
Layout& shared_memory(SIM_SOURCE) {
  static_assert(alignof(Layout) <= 1024, "dynamic shared memory is aligned to 1,024 bytes");
  const sim::Block& block = *sim::self().block;
  if (sizeof(Layout) > block.shared_bytes)
    sim::fail(source, "the shared-memory struct has %zu bytes, the launch asks for %u",
              sizeof(Layout), block.shared_bytes);
  return *reinterpret_cast<Layout*>(block.shared);
}

inline uint32_t shared_address(const void* pointer, SIM_SOURCE) {
  return sim::kSharedWindow + sim::shared_place(pointer, 0, 1, "shared_address", source).offset;
}

}  // namespace dgemma::device
