/* Tensors of a .safetensors file: eight bytes with the length of a JSON header, the header (name,
 * dtype, shape, where the bytes are), the bytes. */
#ifndef EMBED_SAFETENSORS_H_
#define EMBED_SAFETENSORS_H_

#include <dgemma/base.h>

#include "json.h"

typedef struct safetensors {
  char* file;
  size_t bytes; /* of the tensors */
  const char* data;
  json header;
} safetensors;

safetensors safetensors_open(const char* folder, const char* name);
void safetensors_close(safetensors* file);

/* The bytes of a tensor of this dtype and of so many values; ends the program where it has others.
 * NULL where the file has no such tensor. */
const void* safetensors_find(const safetensors* file, const char* name, dgemma_dtype dtype,
                             int64_t values);

#endif
