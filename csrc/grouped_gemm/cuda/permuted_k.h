// The permutation of K in which the sm_90 kernels over 4-bit weights take activations.
//
// wgmma reads B in the order of memory, and a thread of A's four, j, has the columns 2 j, 2 j + 1,
// 2 j + 8 and 2 j + 9 of every step of 16. K may be permuted, since a sum does not depend on its
// order. It is permuted within every 128 columns: thread j takes 32 of them that lie side by side
// in the checkpoint, 16 bytes, and of a word's eight values those at even places in one step, those
// at odd places in the next, two and two. Tokens and h are stored so that their columns meet them:
//
//   column    j j w w h i o     thread, word, half of the word, value of two, odd
//   position  w w o h j j i     (from the upper bit down)
//
// The same code on device and host.
#pragma once

#include <cstdint>

#include "common/ceil_divide.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"

namespace dgemma {

// Columns that are permuted among themselves: a block of K. Rows of permuted columns are whole
// blocks: what lies past the last column is zero.
constexpr int32_t kPermutedBlock = 128;

DGEMMA_HOST_DEVICE constexpr int32_t permuted_width(int32_t columns) {
  return ceil_divide(columns, kPermutedBlock) * kPermutedBlock;
}

// Columns that one thread permutes.
constexpr int32_t kPermutedPerThread = 16;

// The column within its block that stands at this position.
DGEMMA_HOST_DEVICE constexpr int32_t permuted_column(int32_t position) {
  const int32_t i = position & 1, j = position >> 1 & 3, h = position >> 3 & 1;
  const int32_t o = position >> 4 & 1, w = position >> 5;
  return j << 5 | w << 3 | h << 2 | i << 1 | o;
}

}  // namespace dgemma
