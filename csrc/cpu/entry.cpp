#include "cpu/entry.h"

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

}  // namespace dgemma
