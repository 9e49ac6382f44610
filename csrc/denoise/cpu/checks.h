// The checks of arguments that the entry points of the family share. Each function writes a message
// that names the argument, what it got and what it wants.
#pragma once

#include "cpu/entry.h"
#include "denoise/operands.h"
#include "denoise/sizes.h"
#include "dgemma/denoise.h"

namespace dgemma {

// Row indices of active requests in [-1, rows), and no row they name empty.
dgemma_status check_allowed(const dgemma_allowed& allowed, int64_t batch, int64_t length,
                            int64_t vocabulary, const uint8_t* active, dgemma_cpu* cpu);

// Every uniform of an active request is in [0, 1). NULL passes.
dgemma_status check_uniforms(const double* uniforms, int64_t batch, int64_t length,
                             const uint8_t* active, dgemma_cpu* cpu);

// Sizes, dtype and softcap.
dgemma_status check_logits(const dgemma_logits& logits, dgemma_cpu* cpu);

// The temperatures of active requests and the rows of what they allow.
dgemma_status check_requests(const dgemma_logits& logits, dgemma_cpu* cpu);

}  // namespace dgemma
