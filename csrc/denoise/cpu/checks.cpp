#include "denoise/cpu/checks.h"

#include <cinttypes>
#include <cmath>

#include "denoise/cpu/allowed.h"

namespace dgemma {

dgemma_status check_allowed(const dgemma_allowed& allowed, int64_t batch, int64_t length,
                            int64_t vocabulary, const uint8_t* active, dgemma_cpu* cpu) {
  if (allowed.mask == nullptr) return DGEMMA_OK;
  int32_t seen = -1;  // neighbours often share a row: it is searched once
  for (int64_t b = 0; b < batch; ++b) {
    if (active != nullptr && active[b] == 0) continue;
    for (int64_t i = b * length; i < (b + 1) * length; ++i) {
      const int32_t row = allowed.row_index[i];
      if (row < -1 || row >= allowed.rows)
        return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                    "allowed_row: got %d at position %" PRId64 " of request %" PRId64
                    ", wants -1 to %" PRId64,
                    row, i - b * length, b, allowed.rows - 1);
      if (row == seen || row < 0) continue;
      if (!allows_any(allowed.mask + row * words_per_row(vocabulary), vocabulary))
        return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                    "allowed: got row %d without a token, wants at least one (position %" PRId64
                    " of request %" PRId64 ")",
                    row, i - b * length, b);
      seen = row;
    }
  }
  return DGEMMA_OK;
}

dgemma_status check_uniforms(const double* uniforms, int64_t batch, int64_t length,
                             const uint8_t* active, dgemma_cpu* cpu) {
  if (uniforms == nullptr) return DGEMMA_OK;
  for (int64_t b = 0; b < batch; ++b) {
    if (active != nullptr && active[b] == 0) continue;
    for (int64_t i = b * length; i < (b + 1) * length; ++i)
      if (!(uniforms[i] >= 0.0 && uniforms[i] < 1.0))
        return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                    "uniforms: got %g at position %" PRId64 " of request %" PRId64
                    ", wants 0 <= u < 1",
                    uniforms[i], i - b * length, b);
  }
  return DGEMMA_OK;
}

dgemma_status check_logits(const dgemma_logits& logits, dgemma_cpu* cpu) {
  if (const auto status = check_sizes(logits.batch, logits.length, logits.vocabulary, cpu))
    return status;
  if (logits.dtype != DGEMMA_FLOAT32 && logits.dtype != DGEMMA_BFLOAT16)
    return fail(cpu, DGEMMA_UNSUPPORTED, "dtype: got %d, wants float32 (0) or bfloat16 (1)",
                static_cast<int>(logits.dtype));
  if (!(logits.softcap >= 0.0f) || std::isinf(logits.softcap))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "softcap: got %g, wants 0 (none) or a positive number", logits.softcap);
  return DGEMMA_OK;
}

dgemma_status check_requests(const dgemma_logits& logits, dgemma_cpu* cpu) {
  for (int64_t b = 0; b < logits.batch; ++b) {
    if (logits.active != nullptr && logits.active[b] == 0) continue;
    if (!(logits.temperature[b] > 0.0f) || std::isinf(logits.temperature[b]))
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "temperature: got %g for request %" PRId64 ", wants a positive number",
                  logits.temperature[b], b);
  }
  return check_allowed(logits.allowed, logits.batch, logits.length, logits.vocabulary,
                       logits.active, cpu);
}

}  // namespace dgemma
