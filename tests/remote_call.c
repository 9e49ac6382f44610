/* Serves calls of the C interface to a process of another machine's kind: tests/cross.py runs it under an emulator and
 * talks to it by its standard streams. Numbers are little-endian, structs are as the headers lay them out.
 *
 * A call is a header, the function's name, its two structs (absent where their size is 0), the blocks of memory that
 * their pointers lead to, each with its size and its address modulo 64, and the places of those pointers in the first
 * struct. The answer is the result, the second struct, and the blocks.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LARGEST_STRUCT = 1024, MOST_BLOCKS = 64, MOST_POINTERS = 64, ALIGNMENT = 64 };

typedef struct header {
  uint32_t name_bytes, operation_bytes, place_bytes, blocks, pointers;
} header;

typedef struct block {
  uint64_t bytes, phase;
} block;

typedef struct pointer {
  uint64_t field, block, offset; /* in bytes, of the struct and of the block */
} pointer;

static void die(const char* why) {
  fprintf(stderr, "remote_call: %s\n", why);
  exit(1);
}

static int take(void* to, size_t bytes) { return bytes == 0 || fread(to, bytes, 1, stdin) == 1; }

static void give(const void* from, size_t bytes) {
  if (bytes > 0 && fwrite(from, bytes, 1, stdout) != 1) die("the other end is gone");
}

static void must_take(void* to, size_t bytes) {
  if (!take(to, bytes)) die("a call was cut off");
}

static uint64_t call(const char* name, const void* operation, void* place) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  if (symbol == NULL) die(name);
  const size_t length = strlen(name);
  if (length > 10 && strcmp(name + length - 10, "_workspace") == 0) {
    size_t (*size)(const void*);
    memcpy(&size, &symbol, sizeof size);
    return size(operation);
  }
  int (*run)(const void*, void*);
  memcpy(&run, &symbol, sizeof run);
  return (uint64_t)(int64_t)run(operation, place);
}

int main(void) {
  header h;
  while (take(&h, sizeof h)) {
    char name[128] = {0};
    _Alignas(16) unsigned char operation[LARGEST_STRUCT], place[LARGEST_STRUCT];
    if (h.name_bytes >= sizeof name || h.operation_bytes > LARGEST_STRUCT ||
        h.place_bytes > LARGEST_STRUCT || h.blocks > MOST_BLOCKS || h.pointers > MOST_POINTERS)
      die("a call is larger than any of the interface");
    must_take(name, h.name_bytes);
    must_take(operation, h.operation_bytes);
    must_take(place, h.place_bytes);

    block blocks[MOST_BLOCKS];
    unsigned char *memory[MOST_BLOCKS], *start[MOST_BLOCKS];
    for (uint32_t i = 0; i < h.blocks; ++i) {
      must_take(&blocks[i], sizeof blocks[i]);
      memory[i] = aligned_alloc(ALIGNMENT, (blocks[i].bytes + 2 * ALIGNMENT) / ALIGNMENT * ALIGNMENT);
      if (memory[i] == NULL) die("no memory");
      start[i] = memory[i] + blocks[i].phase;
      must_take(start[i], blocks[i].bytes);
    }
    for (uint32_t i = 0; i < h.pointers; ++i) {
      pointer p;
      must_take(&p, sizeof p);
      const unsigned char* target = start[p.block] + p.offset;
      memcpy(operation + p.field, &target, sizeof target);
    }

    const uint64_t result = call(name, h.operation_bytes > 0 ? operation : NULL,
                                 h.place_bytes > 0 ? place : NULL);
    give(&result, sizeof result);
    give(place, h.place_bytes);
    for (uint32_t i = 0; i < h.blocks; ++i) {
      give(start[i], blocks[i].bytes);
      free(memory[i]);
    }
    if (fflush(stdout) != 0) die("the other end is gone");
  }
  return 0;
}
