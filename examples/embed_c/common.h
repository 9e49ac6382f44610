/* What every file of the program needs: giving up with a message, memory, files. */
#ifndef EMBED_COMMON_H_
#define EMBED_COMMON_H_

#include <stddef.h>
#include <stdint.h>
#include <stdnoreturn.h>

/* Prints the message and ends the program with exit code 1. */
noreturn void die(const char* format, ...);

/* Memory aligned to 64 bytes and zeroed; never NULL. free() gives it back. */
void* allocate(size_t bytes);

/* A whole file, one zero byte behind it. */
char* read_file(const char* folder, const char* name, size_t* bytes);

#endif
