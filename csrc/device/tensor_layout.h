// The description of a tensor in global memory that a tensor map is made of, and TMA's demands on
// it. Pure host code.
//
// CUDA driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled". Dimension 0 is the
// innermost and dense.
#pragma once

#include <cstdint>

#include "device/swizzle.h"

namespace dgemma::device {

enum class ElementType : uint32_t { uint8, int32, float32, bfloat16 };

constexpr uint32_t element_bytes(ElementType type) {
  return type == ElementType::uint8 ? 1 : type == ElementType::bfloat16 ? 2 : 4;
}

constexpr int kMaxTensorRank = 5;

struct TensorLayout {
  ElementType type;
  int rank;                         // 1 to 5
  const void* base;                 // aligned to 16
  uint64_t size[kMaxTensorRank];    // elements
  uint64_t stride[kMaxTensorRank];  // bytes; that of dimension 0 is not read, the others are
                                    // multiples of 16
  uint32_t box[kMaxTensorRank];     // elements that one copy moves, at most 256 each
  Swizzle swizzle = Swizzle::none;
};

constexpr uint64_t box_bytes(const TensorLayout& layout) {
  uint64_t bytes = element_bytes(layout.type);
  for (int i = 0; i < layout.rank; ++i) bytes *= layout.box[i];
  return bytes;
}

// Null when TMA takes it, else what it does not take.
inline const char* tensor_layout_error(const TensorLayout& layout) {
  if (layout.rank < 1 || layout.rank > kMaxTensorRank) return "rank must be 1 to 5";
  if (reinterpret_cast<uintptr_t>(layout.base) % 16 != 0)
    return "base must be a multiple of 16 bytes";
  for (int i = 0; i < layout.rank; ++i) {
    if (layout.size[i] < 1 || layout.size[i] > (1ull << 32)) return "size must be 1 to 2^32";
    if (layout.box[i] < 1 || layout.box[i] > 256) return "box must be 1 to 256";
    if (i > 0 && layout.stride[i] % 16 != 0) return "strides must be multiples of 16 bytes";
    if (i > 0 && layout.stride[i] >= (1ull << 40)) return "strides must be below 2^40 bytes";
  }
  const uint32_t row_bytes = layout.box[0] * element_bytes(layout.type);
  if (row_bytes % 16 != 0) return "the box's innermost extent must be a multiple of 16 bytes";
  if (layout.swizzle != Swizzle::none && row_bytes > swizzle_row_bytes(layout.swizzle))
    return "the box's innermost extent must fit a row of the swizzle";
  return nullptr;
}

}  // namespace dgemma::device
