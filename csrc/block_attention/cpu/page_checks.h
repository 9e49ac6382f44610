// Argument checks of the operations on pages.
#pragma once

#include "block_attention/cpu/checks.h"
#include "block_attention/pages.h"

namespace dgemma {

// The pool's extents and strides, and the data type.
template <typename Operation>
dgemma_status check_page_extents(const Operation& op, dgemma_cpu* cpu) {
  const auto status = check_extents({{"pages", op.pages, 0},
                                     {"page_size", op.page_size, 1},
                                     {"key_heads", op.key_heads, 1},
                                     {"head_dim", op.head_dim, 1}},
                                    cpu);
  if (status != DGEMMA_OK) return status;
  for (const NamedStride& stride : strides_of(op))
    if (stride.value < 0 || stride.value > kMaxStride)
      return invalid(cpu, "%s: got %lld, wants 0 .. %lld", stride.name,
                     static_cast<long long>(stride.value), static_cast<long long>(kMaxStride));
  return check_type(op.dtype, cpu);
}

}  // namespace dgemma
