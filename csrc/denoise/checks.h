// What every entry point of the family asks of its arguments. Each function writes a message that
// names the argument, what it got and what it wants.
#pragma once

#include "cpu/entry.h"
#include "denoise/sizes.h"
#include "dgemma/denoise.h"

namespace dgemma {

// Row indices of active requests in [-1, rows), and no row they name empty.
dgemma_status check_allowed(const dgemma_allowed& allowed, int64_t batch, int64_t length,
                            int64_t vocabulary, const uint8_t* active, dgemma_cpu* cpu);

// Of active requests: every uniform in [0, 1). NULL passes.
dgemma_status check_uniforms(const double* uniforms, int64_t batch, int64_t length,
                             const uint8_t* active, dgemma_cpu* cpu);

// Sizes, dtype, softcap, the temperatures of active requests, the allowed rows.
dgemma_status check_logits(const dgemma_logits& logits, dgemma_cpu* cpu);

}  // namespace dgemma
