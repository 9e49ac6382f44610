// ldmatrix and stmatrix: a warp moves 8x8 tiles of 16-bit elements between shared memory and the
// registers of mma.
//
// Lane l gives the address of row l % 8 of tile l / 8: 16 bytes, aligned to 16 (lanes past the last
// tile give any valid address). Of each tile, lane l holds the two elements (row l / 4, columns 2
// (l % 4) and the next), the first in the low half; with `transposed` it holds (rows 2 (l % 4) and
// the next, column l / 4) instead. All 32 lanes must call this. PTX ISA, "Warp-level Matrix
// Instructions: ldmatrix" (sm_75) and "stmatrix" (sm_90).
#pragma once

#include "device/language.h"
#include "device/shared_memory.h"

namespace dgemma::device {

DGEMMA_DEVICE void load_tiles(uint32_t (&tile)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(tile[0])
               : "r"(shared_address(row))
               : "memory");
}
DGEMMA_DEVICE void load_tiles(uint32_t (&tile)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(shared_address(row))
               : "memory");
}
DGEMMA_DEVICE void load_tiles(uint32_t (&tile)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(shared_address(row))
               : "memory");
}

DGEMMA_DEVICE void load_tiles_transposed(uint32_t (&tile)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(tile[0])
               : "r"(shared_address(row))
               : "memory");
}
DGEMMA_DEVICE void load_tiles_transposed(uint32_t (&tile)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(shared_address(row))
               : "memory");
}
DGEMMA_DEVICE void load_tiles_transposed(uint32_t (&tile)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(shared_address(row))
               : "memory");
}

DGEMMA_DEVICE void store_tiles(void* row, const uint32_t (&tile)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
               "r"(tile[0])
               : "memory");
}
DGEMMA_DEVICE void store_tiles(void* row, const uint32_t (&tile)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(tile[0]), "r"(tile[1])
      : "memory");
}
DGEMMA_DEVICE void store_tiles(void* row, const uint32_t (&tile)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
      : "memory");
}

DGEMMA_DEVICE void store_tiles_transposed(void* row, const uint32_t (&tile)[1]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
      "r"(tile[0])
      : "memory");
}
DGEMMA_DEVICE void store_tiles_transposed(void* row, const uint32_t (&tile)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(tile[0]), "r"(tile[1])
      : "memory");
}
DGEMMA_DEVICE void store_tiles_transposed(void* row, const uint32_t (&tile)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
               : "memory");
}

}  // namespace dgemma::device
