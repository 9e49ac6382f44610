#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common.h"

size_t dtype_bytes(dgemma_dtype dtype) { return dtype == DGEMMA_BFLOAT16 ? 2 : 4; }

/* bfloat16 is the upper half of a float; rounded to nearest, ties to even. */
static uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float round_to_dtype(dgemma_dtype dtype, float value) {
  return dtype == DGEMMA_BFLOAT16 ? from_bfloat16(to_bfloat16(value)) : value;
}

/* By memcpy: a file aligns its tensors as it likes. */
float value_at(dgemma_dtype dtype, const void* values, int64_t index) {
  const char* at = (const char*)values + (size_t)index * dtype_bytes(dtype);
  uint16_t half;
  float value;
  if (dtype == DGEMMA_BFLOAT16) {
    memcpy(&half, at, sizeof half);
    return from_bfloat16(half);
  }
  memcpy(&value, at, sizeof value);
  return value;
}

void put_value(dgemma_dtype dtype, void* values, int64_t index, float value) {
  if (dtype == DGEMMA_BFLOAT16)
    ((uint16_t*)values)[index] = to_bfloat16(value);
  else
    ((float*)values)[index] = value;
}

static const void* find_host(const model* m, const char* name, int64_t values) {
  const void* data = safetensors_find(&m->file, name, m->config.dtype, values);
  if (data == NULL) die("%s: is not in the checkpoint", name);
  return data;
}

static const void* find(const model* m, const char* name, int64_t values) {
  return device_share(m->device, find_host(m, name, values),
                      (size_t)values * dtype_bytes(m->config.dtype));
}

static const void* find_in_layer(const model* m, int64_t layer, const char* name, int64_t values) {
  char full[160];
  snprintf(full, sizeof full, "model.decoder.layers.%lld.%s", (long long)layer, name);
  return find(m, full, values);
}

static void open_layer(model* m, int64_t index) {
  const config* c = &m->config;
  const layer_config* of = &c->layer[index];
  layer_weights* w = &m->layer[index];
  const int64_t hidden = c->hidden_size, wide = c->intermediate_size,
                expert = c->moe_intermediate_size;
  const int64_t queries = c->query_heads * of->head_dim, keys = of->key_heads * of->head_dim;
  const struct {
    const void** weight;
    const char* name;
    int64_t values;
  } tensors[] = {
      {&w->input_norm, "input_layernorm.weight", hidden},
      {&w->attended_norm, "post_attention_layernorm.weight", hidden},
      {&w->dense_norm, "pre_feedforward_layernorm.weight", hidden},
      {&w->dense_output_norm, "post_feedforward_layernorm_1.weight", hidden},
      {&w->sparse_norm, "pre_feedforward_layernorm_2.weight", hidden},
      {&w->sparse_output_norm, "post_feedforward_layernorm_2.weight", hidden},
      {&w->output_norm, "post_feedforward_layernorm.weight", hidden},
      {&w->query, "self_attn.q_proj.weight", queries * hidden},
      {&w->key, "self_attn.k_proj.weight", keys * hidden},
      {&w->attention_output, "self_attn.o_proj.weight", hidden * queries},
      {&w->query_norm, "self_attn.q_norm.weight", of->head_dim},
      {&w->key_norm, "self_attn.k_norm.weight", of->head_dim},
      {&w->gate, "mlp.gate_proj.weight", wide * hidden},
      {&w->up, "mlp.up_proj.weight", wide * hidden},
      {&w->down, "mlp.down_proj.weight", hidden * wide},
      {&w->router_scale, "router.scale", hidden},
      {&w->router_projection, "router.proj.weight", c->experts * hidden},
      {&w->router_expert_scale, "router.per_expert_scale", c->experts},
      {&w->experts_gate_up, "experts.gate_up_proj", c->experts * 2 * expert * hidden},
      {&w->experts_down, "experts.down_proj", c->experts * hidden * expert},
  };
  for (size_t i = 0; i < sizeof tensors / sizeof *tensors; ++i)
    *tensors[i].weight = find_in_layer(m, index, tensors[i].name, tensors[i].values);
  if (of->window > 0) w->value = find_in_layer(m, index, "self_attn.v_proj.weight", keys * hidden);
  char name[160];
  snprintf(name, sizeof name, "model.decoder.layers.%lld.layer_scalar", (long long)index);
  w->decoder_scalar = value_at(c->dtype, find_host(m, name, 1), 0);
  snprintf(name, sizeof name, "model.encoder.language_model.layers.%lld.layer_scalar",
           (long long)index);
  w->encoder_scalar = value_at(c->dtype, find_host(m, name, 1), 0);
}

/* The bound that lets the soft embedding leave out what cannot matter. */
static float largest_row_norm(const config* c, const void* embedding) {
  float largest = 0;
  for (int64_t row = 0; row < c->vocabulary; ++row) {
    float squares = 0;
    for (int64_t i = 0; i < c->hidden_size; ++i) {
      const float value = value_at(c->dtype, embedding, row * c->hidden_size + i);
      squares += value * value;
    }
    largest = fmaxf(largest, sqrtf(squares));
  }
  return largest;
}

void model_open(model* m, const char* folder, device* d) {
  *m = (model){.config = config_read(folder), .device = d};
  m->file = safetensors_open(folder, "model.safetensors");
  const config* c = &m->config;
  const int64_t hidden = c->hidden_size, wide = c->intermediate_size;
  m->max_embedding_norm = largest_row_norm(
      c, find_host(m, "model.decoder.embed_tokens.weight", c->vocabulary * hidden));
  m->embedding_scale = round_to_dtype(c->dtype, (float)sqrt((double)hidden));
  m->embedding = find(m, "model.decoder.embed_tokens.weight", c->vocabulary * hidden);
  m->norm = find(m, "model.decoder.norm.weight", hidden);
  m->conditioning_norm = find(m, "model.decoder.self_conditioning.pre_norm.weight", hidden);
  m->conditioning_gate = find(m, "model.decoder.self_conditioning.gate_proj.weight", wide * hidden);
  m->conditioning_up = find(m, "model.decoder.self_conditioning.up_proj.weight", wide * hidden);
  m->conditioning_down = find(m, "model.decoder.self_conditioning.down_proj.weight", hidden * wide);
  for (int64_t i = 0; i < c->layers; ++i) open_layer(m, i);
}

void model_close(model* m) { safetensors_close(&m->file); }
