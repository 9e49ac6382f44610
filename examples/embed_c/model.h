/* The weights of a checkpoint, on a device. */
#ifndef EMBED_MODEL_H_
#define EMBED_MODEL_H_

#include "config.h"
#include "device.h"
#include "safetensors.h"

/* Matrices are [out, in]; of experts [experts, out, in], gate rows before up rows. */
typedef struct layer_weights {
  const void *input_norm, *attended_norm, *dense_norm, *dense_output_norm;
  const void *sparse_norm, *sparse_output_norm, *output_norm;
  const void *query, *key, *value, *attention_output, *query_norm,
      *key_norm; /* value: NULL on full layers */
  const void *gate, *up, *down;
  const void *router_scale, *router_projection, *router_expert_scale;
  const void *experts_gate_up, *experts_down;
  float encoder_scalar, decoder_scalar;
} layer_weights;

typedef struct model {
  config config;
  device* device;
  safetensors file;
  const void *embedding, *norm; /* the embedding is the head too */
  const void *conditioning_norm, *conditioning_gate, *conditioning_up, *conditioning_down;
  layer_weights layer[MOST_LAYERS];
  float embedding_scale;
  float max_embedding_norm;
} model;

/* Ends the program, naming the tensor, where the checkpoint has not what its config.json says. */
void model_open(model* m, const char* folder, device* d);
void model_close(model* m);

/* Rounding to the model's dtype, and where a value of it lies in host memory. */
float round_to_dtype(dgemma_dtype dtype, float value);
float value_at(dgemma_dtype dtype, const void* values, int64_t index);
void put_value(dgemma_dtype dtype, void* values, int64_t index, float value);
size_t dtype_bytes(dgemma_dtype dtype);

#endif
