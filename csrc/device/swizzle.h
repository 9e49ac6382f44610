// Swizzles: where a tile's 16-byte pieces lie in shared memory, so that reading a column of them
// has no bank conflicts.
//
// Rows of 32, 64 or 128 bytes are stored one after the other, and the number of a 16-byte piece
// within its row is exclusive-ored with bits of its address: one, two or three bits from bit 7 up
// go to as many from bit 4 up. The pattern repeats every 256, 512 or 1,024 bytes of the address,
// and a tile must start at a multiple of that. PTX ISA, "Tensor Data: Swizzling Modes"; the same
// for TMA and for wgmma. The same code on device and host.
#pragma once

#include "device/language.h"

namespace dgemma::device {

enum class Swizzle : uint32_t { none, bytes_32, bytes_64, bytes_128 };

// Bytes of a swizzled row; 16 without a swizzle, where rows of eight pieces stand alone.
__host__ __device__ constexpr uint32_t swizzle_row_bytes(Swizzle swizzle) {
  return 16u << static_cast<uint32_t>(swizzle);
}

// The alignment of a swizzled tile.
__host__ __device__ constexpr uint32_t swizzle_period(Swizzle swizzle) {
  return 8 * swizzle_row_bytes(swizzle);
}

// Turns the offset in a tile of plain rows into the offset where the byte lies. The function is an
// exclusive or, its own inverse.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  return offset ^ ((offset >> 3) & (swizzle_row_bytes(swizzle) - 16));
}

}  // namespace dgemma::device
