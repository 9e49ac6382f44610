// The interface between cpu/route.cpp and its kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/grouped_gemm.h"

namespace dgemma {

// The output of the tokens [first, end); hidden_scale is hidden_size^-1/2.
typedef void (*RouterInputTask)(const dgemma_router_input& op, float hidden_scale, int64_t first,
                                int64_t end);
// The ids and weights of the tokens [first, end).
typedef void (*RouterChoiceTask)(const dgemma_router_choice& op, int64_t first, int64_t end);

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(RouterInputTask router_input_tasks[2])
DGEMMA_DECLARE_PER_VARIANT(RouterChoiceTask router_choice_tasks[2])

}  // namespace dgemma
