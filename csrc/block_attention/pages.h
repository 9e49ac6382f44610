// Checks of how pages lie in memory, for the entry points of both devices. Pure host code.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "dgemma/block_attention.h"

namespace dgemma {

// No pool of pages is larger, in elements.
constexpr int64_t kMaxStride = int64_t{1} << 48;

struct NamedStride {
  const char* name;
  int64_t value;
};

// The strides of either operation on pages.
template <typename Operation>
std::array<NamedStride, 6> strides_of(const Operation& op) {
  return {{{"key_page_stride", op.key_page_stride},
           {"key_row_stride", op.key_row_stride},
           {"key_head_stride", op.key_head_stride},
           {"value_page_stride", op.value_page_stride},
           {"value_row_stride", op.value_row_stride},
           {"value_head_stride", op.value_head_stride}}};
}

// An extent of a pool and the stride of its elements.
struct PageDimension {
  int64_t extent, stride;
};
using PageDimensions = std::array<PageDimension, 4>;

inline PageDimensions dimensions_of(const dgemma_append_to_pages& op, int64_t page_stride,
                                    int64_t row_stride, int64_t head_stride) {
  return {
      {{op.pages, page_stride}, {op.page_size, row_stride}, {op.key_heads, head_stride}, {1, 0}}};
}

// Whether all rows are apart, so that storing one changes no other: sorted, every stride is as long
// as what lies within it.
inline bool rows_are_apart(PageDimensions dimensions, int64_t row) {
  std::sort(dimensions.begin(), dimensions.end(),
            [](const PageDimension& a, const PageDimension& b) { return a.stride < b.stride; });
  int64_t within = row;
  for (const auto& [extent, stride] : dimensions) {
    if (extent <= 1) continue;
    if (stride < within) return false;
    within += (extent - 1) * stride;
  }
  return true;
}

// The pool whose own rows overlap, or null. The pools' sizes were checked, so nothing overflows.
inline const char* pool_that_overlaps(const dgemma_append_to_pages& op) {
  const PageDimensions keys =
      dimensions_of(op, op.key_page_stride, op.key_row_stride, op.key_head_stride);
  const PageDimensions values =
      dimensions_of(op, op.value_page_stride, op.value_row_stride, op.value_head_stride);
  if (!rows_are_apart(keys, op.head_dim)) return "key_pages";
  return rows_are_apart(values, op.head_dim) ? nullptr : "value_pages";
}

// Whether a row of keys overlaps one of values. Pools that take turns in memory are one with a
// dimension more.
inline bool pools_overlap(const dgemma_append_to_pages& op) {
  const PageDimensions keys =
      dimensions_of(op, op.key_page_stride, op.key_row_stride, op.key_head_stride);
  const PageDimensions values =
      dimensions_of(op, op.value_page_stride, op.value_row_stride, op.value_head_stride);
  const int64_t element = op.dtype == DGEMMA_BFLOAT16 ? 2 : 4;
  const auto first = static_cast<int64_t>(reinterpret_cast<intptr_t>(op.key_pages));
  const auto second = static_cast<int64_t>(reinterpret_cast<intptr_t>(op.value_pages));
  const int64_t distance = first < second ? second - first : first - second;
  int64_t end = op.head_dim;  // of the pool in front
  for (const auto& [extent, stride] : first < second ? keys : values) end += (extent - 1) * stride;
  if (distance >= end * element) return false;
  PageDimensions together = keys;
  for (size_t i = 0; i < 3; ++i)
    if (keys[i].extent > 1 && keys[i].stride != values[i].stride) return true;
  together[3] = {2, distance / element};
  return distance % element != 0 || !rows_are_apart(together, op.head_dim);
}

}  // namespace dgemma
