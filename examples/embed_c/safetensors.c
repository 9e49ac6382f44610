#include "safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"

safetensors safetensors_open(const char* folder, const char* name) {
  size_t bytes;
  safetensors result = {.file = read_file(folder, name, &bytes)};
  uint64_t length = 0;
  for (int i = 0; bytes >= 8 && i < 8; ++i)
    length |= (uint64_t)(unsigned char)result.file[i] << 8 * i;
  if (bytes < 8 || length > bytes - 8) die("%s: is cut off, or no safetensors file", name);
  /* The parser stops at the header's end: a number there is followed by a bracket. */
  result.header = json_parse(name, result.file + 8, (size_t)length);
  result.data = result.file + 8 + length;
  result.bytes = bytes - 8 - (size_t)length;
  return result;
}

void safetensors_close(safetensors* file) {
  json_free(&file->header);
  free(file->file);
}

const void* safetensors_find(const safetensors* file, const char* name, dgemma_dtype dtype,
                             int64_t values) {
  const json* tensor = json_find(&file->header, name);
  if (tensor == NULL) return NULL;
  const char* wanted = dtype == DGEMMA_BFLOAT16 ? "BF16" : "F32";
  if (strcmp(json_string(tensor, "dtype"), wanted) != 0)
    die("%s: has dtype %s, wants %s", name, json_string(tensor, "dtype"), wanted);
  const json* offsets = json_get(tensor, "data_offsets");
  if (offsets->kind != JSON_ARRAY || offsets->count != 2) die("%s: has no data_offsets", name);
  const double begin = offsets->entries[0].number, end = offsets->entries[1].number;
  const double size = (double)values * (dtype == DGEMMA_BFLOAT16 ? 2 : 4);
  if (!(begin >= 0 && end <= (double)file->bytes && end - begin == size))
    die("%s: has the bytes %.0f to %.0f of %zu, wants %.0f of them", name, begin, end, file->bytes,
        size);
  return file->data + (size_t)begin;
}
