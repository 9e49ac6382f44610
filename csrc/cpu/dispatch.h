// The choice of the CPU variant that a call runs.
#pragma once

#include "dgemma/base.h"

namespace dgemma {

constexpr int kCpuVariants = 4;  // DGEMMA_CPU_SCALAR .. DGEMMA_CPU_AVX512_BF16

// True when this build has the variant and the processor and the operating system run it.
bool cpu_variant_available(dgemma_cpu_variant variant);

// Puts into `variant` what cpu->variant stands for on this machine. For a variant that is unknown
// or not available: DGEMMA_UNSUPPORTED, and cpu->message says which there are.
dgemma_status resolve_cpu_variant(dgemma_cpu* cpu, dgemma_cpu_variant* variant);

}  // namespace dgemma
