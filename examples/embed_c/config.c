#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "json.h"

static json read_json(const char* folder, const char* name) {
  size_t bytes;
  char* text = read_file(folder, name, &bytes);
  const json value = json_parse(name, text, bytes);
  free(text);
  return value;
}

static int64_t size_of(const json* object, const char* key) {
  const double value = json_number(object, key);
  if (!(value >= 1 && value <= INT32_MAX)) die("\"%s\" is %g, wants a size", key, value);
  return (int64_t)value;
}

static layer_config read_layer(const json* text, int64_t index) {
  const json* types = json_get(text, "layer_types");
  if (types->count <= (size_t)index || types->entries[index].kind != JSON_STRING)
    die("\"layer_types\" has no entry for layer %lld", (long long)index);
  const char* type = types->entries[index].text;
  const int sliding = strcmp(type, "sliding_attention") == 0;
  if (json_find(text, "per_layer_config") != NULL) die("\"per_layer_config\" is not supported");
  layer_config layer = {0};
  layer.head_dim = size_of(text, sliding ? "head_dim" : "global_head_dim");
  layer.key_heads = size_of(text, sliding ? "num_key_value_heads" : "num_global_key_value_heads");
  layer.window = sliding ? size_of(text, "sliding_window") : 0;
  const json* rope = json_get(json_get(text, "rope_parameters"), type);
  layer.theta = json_number(rope, "rope_theta");
  layer.factor = json_number_or(rope, "factor", 1);
  layer.turning =
      (int64_t)(json_number_or(rope, "partial_rotary_factor", 1) * (double)layer.head_dim / 2);
  if (layer.turning > layer.head_dim / 2) die("\"partial_rotary_factor\" is above 1");
  return layer;
}

static void read_sampler(const char* folder, config* c) {
  json file = read_json(folder, "generation_config.json");
  c->max_steps = (int32_t)json_number_or(&file, "max_denoising_steps", 48);
  c->t_min = json_number_or(&file, "t_min", 0.4);
  c->t_max = json_number_or(&file, "t_max", 0.8);
  c->stability_threshold = (int32_t)json_number_or(&file, "stability_threshold", 1);
  c->confidence_threshold = (float)json_number_or(&file, "confidence_threshold", 0.005);
  c->entropy_bound =
      (float)json_number_or(json_find(&file, "sampler_config"), "entropy_bound", 0.1);
  const json* eos = json_find(&file, "eos_token_id");
  const json* ids = eos != NULL && eos->kind == JSON_ARRAY ? eos->entries : eos;
  const size_t count = eos == NULL ? 0 : eos->kind == JSON_ARRAY ? eos->count : 1;
  if (count > MOST_EOS) die("\"eos_token_id\" has %zu entries, wants at most %d", count, MOST_EOS);
  for (size_t i = 0; i < count; ++i) c->eos[c->eos_count++] = (int32_t)ids[i].number;
  json_free(&file);
}

config config_read(const char* folder) {
  json file = read_json(folder, "config.json");
  const json* text = json_get(&file, "text_config");
  config c = {0};
  const char* dtype = json_string(&file, "dtype");
  c.dtype = strcmp(dtype, "bfloat16") == 0 ? DGEMMA_BFLOAT16 : DGEMMA_FLOAT32;
  if (c.dtype == DGEMMA_FLOAT32 && strcmp(dtype, "float32") != 0)
    die("dtype %s is not supported", dtype);
  c.hidden_size = size_of(text, "hidden_size");
  c.intermediate_size = size_of(text, "intermediate_size");
  c.moe_intermediate_size = size_of(text, "moe_intermediate_size");
  c.experts = size_of(text, "num_experts");
  c.top_k = size_of(text, "top_k_experts");
  c.vocabulary = size_of(text, "vocab_size");
  c.query_heads = size_of(text, "num_attention_heads");
  c.context = size_of(text, "max_position_embeddings");
  c.canvas_length = size_of(&file, "canvas_length");
  c.epsilon = (float)json_number(text, "rms_norm_eps");
  c.softcap = (float)json_number(text, "final_logit_softcapping");
  c.layers = size_of(text, "num_hidden_layers");
  if (c.layers > MOST_LAYERS)
    die("the model has %lld layers, wants at most %d", (long long)c.layers, MOST_LAYERS);
  for (int64_t i = 0; i < c.layers; ++i) c.layer[i] = read_layer(text, i);
  json_free(&file);
  read_sampler(folder, &c);
  return c;
}
