// The checks of arguments that the entry points of the family share. Each function writes a message
// that names the argument, what it got and what it wants.
#pragma once

#include "cpu/entry.h"
#include "denoise/sizes.h"
#include "dgemma/denoise.h"

namespace dgemma {

// Row indices of active requests in [-1, rows), and no row they name empty.
dgemma_status check_allowed(const dgemma_allowed& allowed, int64_t batch, int64_t length,
                            int64_t vocabulary, const uint8_t* active, dgemma_cpu* cpu);

// Every uniform of an active request is in [0, 1). NULL passes.
dgemma_status check_uniforms(const double* uniforms, int64_t batch, int64_t length,
                             const uint8_t* active, dgemma_cpu* cpu);

// Sizes, dtype, softcap, the temperatures of active requests, the allowed rows, the logits'
// pointer.
dgemma_status check_logits(const dgemma_logits& logits, dgemma_cpu* cpu);

// The logits and every output of the statistics.
dgemma_status check_statistics(const dgemma_vocabulary_statistics& op, dgemma_cpu* cpu);

// The softmax statistics that another operator has left: row_max, row_sum, tile_max and tile_sum
// are all there or none is.
template <typename Op>
dgemma_status check_softmax_statistics(const Op& op, dgemma_cpu* cpu) {
  if (op.logits.batch * op.logits.length == 0) return DGEMMA_OK;
  return check_buffers({{"row_max", op.row_max, sizeof(float)},
                        {"row_sum", op.row_sum, sizeof(double)},
                        {"tile_max", op.tile_max, sizeof(float)},
                        {"tile_sum", op.tile_sum, sizeof(float)}},
                       cpu);
}

// The seed, canvas index and step that uniforms are drawn with, where none are given.
template <typename Op>
dgemma_status check_draws(const Op& op, int64_t batch, dgemma_cpu* cpu) {
  if (op.uniforms != nullptr || batch == 0) return DGEMMA_OK;
  return check_buffers({{"seed", op.seed, sizeof(int64_t)},
                        {"canvas_index", op.canvas_index, sizeof(int32_t)},
                        {"step", op.step, sizeof(int32_t)}},
                       cpu);
}

}  // namespace dgemma
