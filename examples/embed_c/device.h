/* Where the model runs: memory, copies, and the operations of libdgemma, in one table.
 *
 * The operations' structs are the same on both devices; only the struct that says where a call runs
 * differs (dgemma_cpu, dgemma_cuda), so here it is a void pointer.
 */
#ifndef EMBED_DEVICE_H_
#define EMBED_DEVICE_H_

#include <dgemma/block_attention.h>
#include <dgemma/denoise.h>
#include <dgemma/grouped_gemm.h>
#include <dgemma/layer.h>
#include <dgemma/vocabulary_head.h>

/* X(function, struct) for every operation. */
#define EMBED_OPERATIONS(X)                 \
  X(token_embedding, token_embedding)       \
  X(rms_norm, rms_norm)                     \
  X(dense, dense)                           \
  X(normalise_heads, normalise_heads)       \
  X(canvas_attention, block_attention)      \
  X(causal_attention, block_attention)      \
  X(append_to_cache, append_to_cache)       \
  X(attention_residual, attention_residual) \
  X(gelu_product, gelu_product)             \
  X(route, route)                           \
  X(moe_ffn, moe_ffn)                       \
  X(layer_output, layer_output)             \
  X(vocabulary_head, vocabulary_head)       \
  X(noise, noise)                           \
  X(sample, sample)                         \
  X(update_canvas, update_canvas)           \
  X(soft_embedding, soft_embedding)

/* And for those that say how much workspace they want. */
#define EMBED_WORKSPACES(X)           \
  X(dense, dense)                     \
  X(block_attention, block_attention) \
  X(route, route)                     \
  X(moe_ffn, moe_ffn)                 \
  X(vocabulary_head, vocabulary_head) \
  X(soft_embedding, soft_embedding)

typedef struct device {
  const char* name;
  void* context;        /* a dgemma_cpu or a dgemma_cuda */
  const char* message;  /* of the context */
  int sees_host_memory; /* so that weights need no copy */
  void* (*allocate)(size_t bytes);
  void (*release)(void* memory);
  void (*write)(void* to, const void* host, size_t bytes);
  /* Waits until everything before it is done. */
  void (*read)(void* host, const void* from, size_t bytes);
  void (*close)(void); /* or NULL */
#define EMBED_MEMBER(function, op) dgemma_status (*function)(const dgemma_##op*, void* context);
  EMBED_OPERATIONS(EMBED_MEMBER)
#undef EMBED_MEMBER
#define EMBED_MEMBER(function, op) size_t (*function##_workspace)(const dgemma_##op*);
  EMBED_WORKSPACES(EMBED_MEMBER)
#undef EMBED_MEMBER
  /* One workspace for all: operations follow each other. */
  void* workspace;
  size_t workspace_bytes;
  /* What device_memory gave. */
  void** owned;
  size_t owned_count;
} device;

device device_cpu(void);
#if defined(EMBED_WITH_CUDA)
device device_cuda(void);
#endif

/* Gives back the workspace and all that device_memory gave. */
void device_close(device* d);

/* Zeroed memory of the device, until device_close. */
void* device_memory(device* d, size_t bytes);
/* The device's own copy of host memory, or where it sees that, the memory itself. */
const void* device_share(device* d, const void* host, size_t bytes);

/* Ends the program with the library's message where an operation was refused. */
void device_check(const device* d, const char* operation, dgemma_status status);
#define DEVICE_CALL(d, function, op) device_check((d), #function, (d)->function((op), (d)->context))

/* Makes the workspace at least so large. */
void device_reserve(device* d, size_t bytes);

#endif
