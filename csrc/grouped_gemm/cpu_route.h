// What cpu_route.cpp asks of the kernels that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "dgemma/grouped_gemm.h"

namespace dgemma {

// scaled[token] = what the projection takes, for the tokens [first, end); hidden_scale is
// hidden_size^-1/2.
typedef void (*RouteTask)(const dgemma_route& op, float hidden_scale, void* scaled, int64_t first,
                          int64_t end);

// Indexed by dgemma_dtype.
extern const RouteTask kRouteTasksScalar[2];
#if defined(__x86_64__)
extern const RouteTask kRouteTasksAvx2[2];
extern const RouteTask kRouteTasksAvx512[2];
extern const RouteTask kRouteTasksAvx512Bf16[2];
#endif

}  // namespace dgemma
