#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "device.h"

/* One context for the program's one thread. A host with threads of its own puts its parallel loop
 * into parallel_for; see dgemma/base.h. */
static dgemma_cpu serial = DGEMMA_CPU_SERIAL;

static void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

#define FORWARD(function, op)                                                \
  static dgemma_status run_##function(const dgemma_##op* o, void* context) { \
    return dgemma_cpu_##function(o, context);                                \
  }
EMBED_OPERATIONS(FORWARD)

device device_cpu(void) {
  return (device){.name = dgemma_cpu_variant_name(dgemma_cpu_best_variant()),
                  .context = &serial,
                  .message = serial.message,
                  .sees_host_memory = 1,
                  .allocate = allocate,
                  .release = free,
                  .write = copy,
                  .read = copy,
#define ENTRY(function, op) .function = run_##function,
                  EMBED_OPERATIONS(ENTRY)
#undef ENTRY
#define ENTRY(function, op) .function##_workspace = dgemma_cpu_##function##_workspace,
                      EMBED_WORKSPACES(ENTRY)
#undef ENTRY
  };
}
