// The block's dynamic shared memory, and addresses in it.
#pragma once

#include "device/language.h"

namespace dgemma::device {

// The kernel's one shared-memory struct, at the start of dynamic shared memory. 1,024 bytes are the
// period of the widest swizzle, so every swizzled tile can be aligned inside the struct.
template <typename Layout>
DGEMMA_DEVICE Layout& shared_memory() {
  static_assert(alignof(Layout) <= 1024, "dynamic shared memory is aligned to 1,024 bytes");
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Layout*>(dynamic_shared_memory);
}

// The address within the block's shared window, as instructions and matrix descriptors take it.
DGEMMA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace dgemma::device
