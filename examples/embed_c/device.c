#include "device.h"

#include <stdlib.h>

#include "common.h"

void device_close(device* d) {
  for (size_t i = 0; i < d->owned_count; ++i) d->release(d->owned[i]);
  free(d->owned);
  d->release(d->workspace);
  if (d->close != NULL) d->close();
}

void* device_memory(device* d, size_t bytes) {
  void** longer = realloc(d->owned, (d->owned_count + 1) * sizeof *longer);
  if (longer == NULL) die("no memory");
  d->owned = longer;
  return d->owned[d->owned_count++] = d->allocate(bytes);
}

const void* device_share(device* d, const void* host, size_t bytes) {
  if (d->sees_host_memory) return host;
  void* copy = device_memory(d, bytes);
  d->write(copy, host, bytes);
  return copy;
}

void device_check(const device* d, const char* operation, dgemma_status status) {
  if (status != DGEMMA_OK) die("%s: %s: %s", operation, dgemma_status_name(status), d->message);
}

void device_reserve(device* d, size_t bytes) {
  if (bytes <= d->workspace_bytes) return;
  d->release(d->workspace);
  d->workspace = d->allocate(bytes);
  d->workspace_bytes = bytes;
}
