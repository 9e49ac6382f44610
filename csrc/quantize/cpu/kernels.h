// The interface between cpu/entry_points.cpp and its kernels, which are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/quantize.h"

namespace dgemma {

// Codes, scales and errors of the rows [first_row, end_row).
typedef void (*QuantizeTask)(const dgemma_quantize_weight& op, int64_t first_row, int64_t end_row);

// Indexed by dgemma_weight_format - 1 and by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(QuantizeTask quantize_tasks[4][2])

}  // namespace dgemma
