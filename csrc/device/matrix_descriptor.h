// The 64-bit description of a matrix tile in shared memory that wgmma takes. The same code on
// device and host.
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout: Matrix Descriptor, Strides,
// Canonical Layouts". A tile is `rows` (the M of A, the N of B) by k, of bfloat16. Bits 0-13 hold
// the start address, 16-29 the leading and 32-45 the stride byte offset, all three divided by 16,
// and 62-63 the swizzle. What the two offsets mean:
//
//
// - k-major, swizzled: rows of the swizzle's width, k along them. stride: from 8 rows to the
// next 8.
//   leading: not used. To go on along k within a row, move the start by the bytes (`advanced`).
// - k-major, no swizzle: pieces of 8 rows by 8 k, 128 bytes each. leading: to the next 8 k. stride:
//   to the next 8 rows.
// - row-major ("mn"), swizzled: lines of the swizzle's width, rows along them, one line per k, 8 k
// to
//   a period. leading: to the next such many rows. stride: to the next 8 k.
// - row-major, no swizzle: pieces of 8 k by 8 rows, 128 bytes each. stride: to the next 8 rows.
//   leading: to the next 8 k.
#pragma once

#include "device/language.h"
#include "device/shared_memory.h"
#include "device/swizzle.h"

namespace dgemma::device {

// The index that runs along memory: k, or m (of A) and n (of B).
enum class Major : uint32_t { k = 0, mn = 1 };

struct MatrixDescriptor {
  uint64_t bits;
};

DGEMMA_DEVICE MatrixDescriptor matrix_descriptor(const void* start, Swizzle swizzle,
                                                 uint32_t leading_bytes, uint32_t stride_bytes) {
  // none, 32, 64, 128 bytes are 0, 3, 2, 1 here.
  const uint64_t mode = (4 - static_cast<uint64_t>(swizzle)) & 3;
  return {static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) |
          static_cast<uint64_t>(leading_bytes >> 4) << 16 |
          static_cast<uint64_t>(stride_bytes >> 4) << 32 | mode << 62};
}

// A swizzled k-major tile whose groups of 8 rows follow one another: what one TMA box gives.
DGEMMA_DEVICE MatrixDescriptor k_major_descriptor(const void* start, Swizzle swizzle) {
  return matrix_descriptor(start, swizzle, 16, swizzle_period(swizzle));
}

// The descriptor of the tile that starts so many bytes further on.
DGEMMA_DEVICE MatrixDescriptor advanced(MatrixDescriptor descriptor, uint32_t bytes) {
  return {descriptor.bits + (bytes >> 4)};
}

}  // namespace dgemma::device
