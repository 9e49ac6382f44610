// The kernels of the automata that read logits. Included once per instruction set: see
// cpu/variants.h.
#pragma once

#include "automaton/cpu/class_statistics_kernel.h"
#include "automaton/cpu/sample_class_kernel.h"

namespace dgemma::DGEMMA_VARIANT {

const AutomatonKernels automaton_kernels = {
    {class_statistics_row<float>, class_statistics_row<bfloat16>},
    {sample_class_row<float>, sample_class_row<bfloat16>}};

}  // namespace dgemma::DGEMMA_VARIANT
