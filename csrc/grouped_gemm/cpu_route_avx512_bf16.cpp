#include "grouped_gemm/cpu_route_kernel.h"

namespace dgemma {

const RouteTask kRouteTasksAvx512Bf16[2] = DGEMMA_ROUTE_TASKS;

}  // namespace dgemma
