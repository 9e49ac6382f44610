// The kernels of the router's input. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "grouped_gemm/cpu/route_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const RouteTask route_tasks[2] = {route_task<float>, route_task<bfloat16>};

}  // namespace dgemma::DGEMMA_VARIANT
