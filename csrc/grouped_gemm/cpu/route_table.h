// The kernels of the router's input and of its choice. Included
// once per instruction set: see cpu/variants.h.
#pragma once

#include "grouped_gemm/cpu/route_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const RouterInputTask router_input_tasks[2] = {router_input_task<float>,
                                               router_input_task<bfloat16>};
const RouterChoiceTask router_choice_tasks[2] = {router_choice_task<float>,
                                                 router_choice_task<bfloat16>};

}  // namespace dgemma::DGEMMA_VARIANT
