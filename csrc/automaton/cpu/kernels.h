// The interface between the entry points and the kernels that read logits, which are compiled once
// per instruction set.
#pragma once

#include "automaton/automaton.h"
#include "cpu/variants.h"

namespace dgemma {

struct AutomatonKernels {
  // Indexed by dgemma_dtype.
  void (*class_statistics[2])(const dgemma_class_statistics& op, int64_t row);
  void (*sample_class[2])(const dgemma_sample_class& op, int64_t row, float* tile_max,
                          float* tile_sum);
};

DGEMMA_DECLARE_PER_VARIANT(AutomatonKernels automaton_kernels)

}  // namespace dgemma
