#include "cpu/entry.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace dgemma {

dgemma_status fail(dgemma_cpu* cpu, dgemma_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(cpu->message, sizeof cpu->message, format, arguments);
  va_end(arguments);
  return status;
}

dgemma_status check_call(const void* op, dgemma_cpu* cpu) {
  if (cpu == nullptr) return DGEMMA_INVALID_ARGUMENT;
  if (op != nullptr) return DGEMMA_OK;
  return fail(cpu, DGEMMA_INVALID_ARGUMENT, "op: got NULL, wants a pointer");
}

dgemma_status check_sizes(std::initializer_list<SizeArgument> sizes, dgemma_cpu* cpu) {
  for (const auto& [name, value, least, most] : sizes)
    if (value < least || value > most)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "%s: got %" PRId64 ", wants %" PRId64 " to %" PRId64, name, value, least, most);
  return DGEMMA_OK;
}

dgemma_status check_dtype(dgemma_dtype dtype, dgemma_cpu* cpu) {
  if (dtype == DGEMMA_FLOAT32 || dtype == DGEMMA_BFLOAT16) return DGEMMA_OK;
  return fail(cpu, DGEMMA_UNSUPPORTED, "dtype: got %d, wants %d (float32) or %d (bfloat16)",
              static_cast<int>(dtype), DGEMMA_FLOAT32, DGEMMA_BFLOAT16);
}

}  // namespace dgemma
