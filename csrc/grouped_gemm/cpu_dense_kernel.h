// One task of a dense projection: some rows of the weight, for all rows of the input. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu_dense.h"
#include "grouped_gemm/cpu_rows_kernel.h"

namespace dgemma {
namespace {

template <typename T>
void dense_task(const dgemma_dense& op, int64_t first_row, int64_t end_row) {
  const int64_t k = op.in_features;
  const T* input = static_cast<const T*>(op.input);
  const T* weight = static_cast<const T*>(op.weight);
  T* output = static_cast<T*>(op.output);
  prefetch_first_tile(weight + first_row * k, weight + (first_row + kHalfRows) * k, k);
  for (int64_t block = 0; block < op.rows; block += kTokensPerBlock) {
    const int64_t left = op.rows - block;
    const int64_t rows = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < rows; ++t) x[t] = input + (block + t) * k;
    multiply_rows<T, T>(x, rows, weight, op.out_features, k, first_row, end_row, block == 0,
                        [&](int64_t t) { return output + (block + t) * op.out_features; });
  }
}

}  // namespace
}  // namespace dgemma

// The table that a file named after its instruction set exports.
#define DGEMMA_DENSE_TASKS {dense_task<float>, dense_task<bfloat16>}
