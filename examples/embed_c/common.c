#include "common.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

noreturn void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("embed_c: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(1);
}

void* allocate(size_t bytes) {
  const size_t rounded = bytes / 64 * 64 + 64; /* aligned_alloc takes whole multiples */
  void* memory = rounded > bytes ? aligned_alloc(64, rounded) : NULL;
  if (memory == NULL) die("no memory for %zu bytes", bytes);
  memset(memory, 0, rounded);
  return memory;
}

char* read_file(const char* folder, const char* name, size_t* bytes) {
  char path[4096];
  if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
    die("%s: the path is too long", folder);
  FILE* file = fopen(path, "rb");
  if (file == NULL) die("%s: %s", path, strerror(errno));
  if (fseek(file, 0, SEEK_END) != 0) die("%s: %s", path, strerror(errno));
  const long size = ftell(file);
  if (size < 0) die("%s: %s", path, strerror(errno));
  rewind(file);
  char* content = allocate((size_t)size + 1);
  if (fread(content, 1, (size_t)size, file) != (size_t)size) die("%s: cannot be read", path);
  fclose(file);
  *bytes = (size_t)size;
  return content;
}
