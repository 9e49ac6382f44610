// The interface between cpu/route.cpp and its kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/grouped_gemm.h"

namespace dgemma {

// scaled[token] = what the projection takes, for the tokens [first, end); hidden_scale is
// hidden_size^-1/2.
typedef void (*RouteTask)(const dgemma_route& op, float hidden_scale, void* scaled, int64_t first,
                          int64_t end);

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(RouteTask route_tasks[2])

}  // namespace dgemma
