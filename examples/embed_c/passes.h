/* The two passes of the model: encode fills the cache, denoise reads it. */
#ifndef EMBED_PASSES_H_
#define EMBED_PASSES_H_

#include "model.h"

/* Rows of a layer's cache and what it holds: position p lies in row p % capacity. */
typedef struct layer_cache {
  void *keys, *values; /* [1 slot, capacity, key_heads, head_dim] */
  int64_t capacity;
} layer_cache;

typedef struct passes {
  const model* model;
  device* device;
  int64_t most_rows; /* that a pass may have */
  int64_t length;    /* positions in the cache */
  layer_cache cache[MOST_LAYERS];
  /* The first layer with the same rotation, whose tables serve; and where they begin and end. */
  int64_t table_of[MOST_LAYERS];
  void *cosine[MOST_LAYERS], *sine[MOST_LAYERS];
  void *host_cosine, *host_sine;
  int64_t table_first, table_rows;
  /* [most_rows, ...] each */
  int32_t* ids;
  void *hidden, *normed, *raw_query, *raw_key, *raw_value, *query, *key, *value;
  void *attended, *projected, *residual, *dense_input, *sparse_input, *gate, *up, *activated;
  void *dense, *sparse, *conditioning;
  int32_t* expert_ids;
  float* expert_weights;
  int32_t *slot, *prefix_length; /* one each */
} passes;

/* For prompts and canvases that together take up to `most_positions`. */
void passes_open(passes* p, const model* m, int64_t most_positions);
void passes_close(passes* p);

/* Appends `count` ids (in host memory) to the cache. */
void encode(passes* p, const int32_t* ids, int64_t count);

/* What the vocabulary head takes, [count, hidden_size], for the canvas whose ids are in device
 * memory. soft_embedding is of the last step, or NULL in the first. */
const void* denoise(passes* p, const int32_t* ids, int64_t count, const void* soft_embedding);

#endif
