// Permutes rows of bfloat16 as permuted_k.h says. A thread has eight values of each parity: four
// that follow each other for each of the four threads j.
#pragma once

#include "device/bfloat16.h"
#include "device/bytes.h"
#include "grouped_gemm/cuda/permuted_k.h"

namespace dgemma {

struct PermuteRows {
  const device::bfloat16* from;  // [rows, columns], columns a multiple of 32
  device::bfloat16* to;          // [rows, permuted_width(columns)]
  int32_t rows, columns;
};

DGEMMA_DEVICE void permute(const PermuteRows& p, int64_t thread) {
  const int32_t width = permuted_width(p.columns), per_row = width / kPermutedPerThread;
  const int64_t row = thread / per_row;
  if (row >= p.rows) return;
  const int32_t part = static_cast<int32_t>(thread % per_row);
  const int32_t block = part / 8 * kPermutedBlock;
  const int32_t word = part % 8 / 2, half = part % 2;
  uint32_t even[4] = {}, odd[4] = {};
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const int32_t column = block + 32 * j + 8 * word + 4 * half;
    if (column >= p.columns) continue;
    const uint2 four = *reinterpret_cast<const uint2*>(p.from + row * p.columns + column);
    even[j] = device::permute_bytes(four.x, four.y, 0x5410);
    odd[j] = device::permute_bytes(four.x, four.y, 0x7632);
  }
  device::bfloat16* to = p.to + row * width + block + 32 * word + 8 * half;
  *reinterpret_cast<uint4*>(to) = {even[0], even[1], even[2], even[3]};
  *reinterpret_cast<uint4*>(to + 16) = {odd[0], odd[1], odd[2], odd[3]};
}

}  // namespace dgemma
