// One task of a dense projection: some rows of the weight, for all rows of the input. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/dense.h"
#include "grouped_gemm/cpu/rows_kernel.h"

namespace dgemma {
namespace {

// output[:, first_row : end_row]; `first` and `second` give the weight's rows.
template <typename T, typename Rows>
inline void dense_rows(const dgemma_dense& op, int64_t first_row, int64_t end_row,
                       const Rows& first, const Rows& second) {
  const int64_t k = op.in_features;
  const T* input = static_cast<const T*>(op.input);
  T* output = static_cast<T*>(op.output);
  prefetch_first_tile(first, first_row, second, first_row + kHalfRows);
  for (int64_t block = 0; block < op.rows; block += kTokensPerBlock) {
    const int64_t left = op.rows - block;
    const int64_t rows = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < rows; ++t) x[t] = input + (block + t) * k;
    multiply_rows<T, T>(x, rows, first, second, op.out_features, k, first_row, end_row, block == 0,
                        [&](int64_t t) { return output + (block + t) * op.out_features; });
  }
}

template <typename T>
void dense_task(const DensePass& pass, int64_t first_row, int64_t end_row) {
  const dgemma_dense& op = pass.op;
  const PlainRows<T> rows{static_cast<const T*>(op.weight), op.in_features};
  dense_rows<T>(op, first_row, end_row, rows, rows);
}

}  // namespace
}  // namespace dgemma
