// Checks and sizes of a matrix of 4 or 8 bits.
#pragma once

#include <cstdint>

#include "cpu/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/weight_format.h"

namespace dgemma {

// Columns of a quantized matrix at most: a task keeps 24 tokens' values on its stack, 786 KB then,
// or twice that where they are widened. The model's widest row has 8,192.
constexpr int64_t kMostQuantizedColumns = 16384;

// Bytes of one row's values, for a caller who sizes tensors before anything is checked: a number
// that is no format counts as 4 bits, and is refused later.
inline int64_t stored_row_bytes(const dgemma_quantized& matrix, int64_t columns) {
  return is_weight_format(matrix.format) ? row_bytes(matrix.format, columns) : columns / 2;
}

// A status and a message for what is wrong with a matrix of so many rows, named `name`; `run` is
// the number of rows that row scales (the C interface's factors) must not straddle.
dgemma_status check_quantized(const char* name, const dgemma_quantized& matrix, int64_t run,
                              int64_t columns, dgemma_cpu* cpu);

}  // namespace dgemma
