/* config.json and generation_config.json: sizes of the model, settings of the sampler. */
#ifndef EMBED_CONFIG_H_
#define EMBED_CONFIG_H_

#include <dgemma/base.h>

#define MOST_LAYERS 256
#define MOST_EOS 16

typedef struct layer_config {
  int64_t head_dim;
  int64_t key_heads;
  int64_t window; /* 0: a full-attention layer, whose values are its raw keys */
  /* Rotary embedding: the first turning pairs of head_dim / 2 turn, by theta^(-2 i / head_dim). */
  double theta;
  double factor;
  int64_t turning;
} layer_config;

typedef struct config {
  dgemma_dtype dtype;
  int64_t hidden_size, intermediate_size, moe_intermediate_size;
  int64_t experts, top_k, vocabulary, query_heads, context;
  int64_t canvas_length;
  float epsilon, softcap;
  int64_t layers;
  layer_config layer[MOST_LAYERS];
  /* The sampler. */
  int32_t max_steps, stability_threshold;
  double t_min, t_max;
  float entropy_bound, confidence_threshold;
  int64_t eos_count;
  int32_t eos[MOST_EOS];
} config;

config config_read(const char* folder);

#endif
