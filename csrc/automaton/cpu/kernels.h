// The interface between the entry points and the kernel that reads logits, which is compiled once
// per instruction set.
#pragma once

#include "automaton/automaton.h"
#include "cpu/variants.h"

namespace dgemma {

struct AutomatonKernels {
  // Indexed by dgemma_dtype.
  void (*class_statistics[2])(const dgemma_class_statistics& op, int64_t row);
};

DGEMMA_DECLARE_PER_VARIANT(AutomatonKernels automaton_kernels)

}  // namespace dgemma
