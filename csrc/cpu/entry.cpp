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

dgemma_status check_workspace(const void* workspace, size_t bytes, size_t wanted, dgemma_cpu* cpu) {
  if (wanted == 0) return DGEMMA_OK;
  if (workspace == nullptr)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "workspace: got NULL, wants %zu bytes", wanted);
  if (reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "workspace: got %p, wants a multiple of %zu bytes",
                workspace, kAlignment);
  if (bytes < wanted)
    return fail(cpu, DGEMMA_WORKSPACE_TOO_SMALL, "workspace_bytes: got %zu, wants at least %zu",
                bytes, wanted);
  return DGEMMA_OK;
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

dgemma_status check_buffers(std::initializer_list<BufferArgument> buffers, dgemma_cpu* cpu) {
  for (const auto& [name, pointer, alignment, may_be_null] : buffers) {
    if (pointer == nullptr && !may_be_null)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT, "%s: got NULL, wants a pointer", name);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT, "%s: got %p, wants a multiple of %zu bytes", name,
                  pointer, alignment);
  }
  return DGEMMA_OK;
}

}  // namespace dgemma
