// The interface between cpu/dense.cpp and its kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cpu/int8_tokens.h"

namespace dgemma {

// Rows of the weight that one task takes. 96 of 2816 bfloat16 values are 540 KB, which stay in a
// second-level cache of 1 MiB beside a block of input rows.
constexpr int64_t kDenseRowsPerTask = 96;

// A call: `weight` in place of the operation's own, with INT8 weights the rounded input.
struct DensePass {
  const dgemma_dense& op;
  const dgemma_quantized* weight;
  Int8Tokens rounded;
};

// output[:, first_row : end_row], rows of the weight being columns of the output.
typedef void (*DenseTask)(const DensePass& pass, int64_t first_row, int64_t end_row);

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(DenseTask dense_tasks[2])
DGEMMA_DECLARE_PER_VARIANT(DenseTask quantized_dense_tasks[2])

}  // namespace dgemma
