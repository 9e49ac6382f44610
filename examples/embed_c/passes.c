#include "passes.h"

#include <math.h>
#include <stdlib.h>

#include "common.h"

/* Long prompts are encoded in pieces of this many positions, with the same result at any number. */
#define ENCODE_CHUNK 1024

typedef enum pass_kind { ENCODE, DENOISE } pass_kind;

/* Operations ----------------------------------------------------------------------------------- */

/* output = input . weight^T */
static void multiply(passes* p, const void* input, const void* weight, int64_t rows, int64_t in,
                     int64_t out, void* output) {
  device* d = p->device;
  dgemma_dense op = {.rows = rows,
                     .in_features = in,
                     .out_features = out,
                     .dtype = p->model->config.dtype,
                     .input = input,
                     .weight = weight,
                     .output = output};
  device_reserve(d, d->dense_workspace(&op));
  op.workspace = d->workspace;
  op.workspace_bytes = d->workspace_bytes;
  DEVICE_CALL(d, dense, &op);
}

/* down(gelu_tanh(gate x) * up x) */
static void gated_mlp(passes* p, const void* input, const void* gate, const void* up,
                      const void* down, int64_t rows, void* output) {
  const config* c = &p->model->config;
  const int64_t hidden = c->hidden_size, wide = c->intermediate_size;
  multiply(p, input, gate, rows, hidden, wide, p->gate);
  multiply(p, input, up, rows, hidden, wide, p->up);
  const dgemma_gelu_product op = {.values = rows * wide,
                                  .dtype = c->dtype,
                                  .gate = p->gate,
                                  .up = p->up,
                                  .output = p->activated};
  DEVICE_CALL(p->device, gelu_product, &op);
  multiply(p, p->activated, down, rows, wide, hidden, output);
}

static void normalise(passes* p, const void* input, const void* weight, int64_t rows,
                      void* output) {
  const config* c = &p->model->config;
  const dgemma_rms_norm op = {.tokens = rows,
                              .hidden_size = c->hidden_size,
                              .epsilon = c->epsilon,
                              .dtype = c->dtype,
                              .input = input,
                              .weight = weight,
                              .output = output};
  DEVICE_CALL(p->device, rms_norm, &op);
}

/* Rotary tables -------------------------------------------------------------------------------- */

static int same_rotation(const layer_config* a, const layer_config* b) {
  return a->head_dim == b->head_dim && a->theta == b->theta && a->factor == b->factor &&
         a->turning == b->turning;
}

/* Angles in fp32, their cosines and sines rounded to the model's dtype: both halves alike. */
static void fill_table(passes* p, int64_t layer, int64_t first, int64_t rows) {
  const layer_config* of = &p->model->config.layer[layer];
  const dgemma_dtype dtype = p->model->config.dtype;
  const int64_t half = of->head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float exponent = (float)(2 * i) / (float)of->head_dim;
    const float frequency =
        i < of->turning ? 1.0f / powf((float)of->theta, exponent) / (float)of->factor : 0.0f;
    for (int64_t row = 0; row < rows; ++row) {
      const float angle = (float)(first + row) * frequency;
      for (int64_t at = row * of->head_dim + i; at < (row + 1) * of->head_dim; at += half) {
        put_value(dtype, p->host_cosine, at, cosf(angle));
        put_value(dtype, p->host_sine, at, sinf(angle));
      }
    }
  }
  const size_t bytes = (size_t)(rows * of->head_dim) * dtype_bytes(dtype);
  p->device->write(p->cosine[layer], p->host_cosine, bytes);
  p->device->write(p->sine[layer], p->host_sine, bytes);
}

static void fill_tables(passes* p, int64_t rows) {
  if (p->table_rows == rows && p->table_first == p->length) return;
  for (int64_t i = 0; i < p->model->config.layers; ++i)
    if (p->table_of[i] == i) fill_table(p, i, p->length, rows);
  p->table_first = p->length;
  p->table_rows = rows;
}

/* One layer ------------------------------------------------------------------------------------ */

/* From p->normed to p->query, p->key, p->value. */
static void project(passes* p, int64_t layer, int64_t rows) {
  const config* c = &p->model->config;
  const layer_config* of = &c->layer[layer];
  const layer_weights* w = &p->model->layer[layer];
  const int64_t queries = c->query_heads * of->head_dim, keys = of->key_heads * of->head_dim;
  multiply(p, p->normed, w->query, rows, c->hidden_size, queries, p->raw_query);
  multiply(p, p->normed, w->key, rows, c->hidden_size, keys, p->raw_key);
  if (w->value != NULL) multiply(p, p->normed, w->value, rows, c->hidden_size, keys, p->raw_value);
  const dgemma_normalise_heads op = {.tokens = rows,
                                     .query_heads = c->query_heads,
                                     .key_heads = of->key_heads,
                                     .head_dim = of->head_dim,
                                     .epsilon = c->epsilon,
                                     .dtype = c->dtype,
                                     .raw_query = p->raw_query,
                                     .raw_key = p->raw_key,
                                     .raw_value = w->value != NULL ? p->raw_value : NULL,
                                     .query_norm = w->query_norm,
                                     .key_norm = w->key_norm,
                                     .cosine = p->cosine[p->table_of[layer]],
                                     .sine = p->sine[p->table_of[layer]],
                                     .query = p->query,
                                     .key = p->key,
                                     .value = p->value};
  DEVICE_CALL(p->device, normalise_heads, &op);
}

static void attend(passes* p, int64_t layer, int64_t rows, pass_kind kind) {
  const config* c = &p->model->config;
  const layer_config* of = &c->layer[layer];
  device* d = p->device;
  dgemma_block_attention op = {.batch = 1,
                               .block_length = rows,
                               .query_heads = c->query_heads,
                               .key_heads = of->key_heads,
                               .head_dim = of->head_dim,
                               .slots = 1,
                               .capacity = p->cache[layer].capacity,
                               .window = of->window,
                               .scale = 1.0f,
                               .dtype = c->dtype,
                               .query = p->query,
                               .key = p->key,
                               .value = p->value,
                               .prefix_key = p->cache[layer].keys,
                               .prefix_value = p->cache[layer].values,
                               .slot = p->slot,
                               .prefix_length = p->prefix_length,
                               .output = p->attended};
  device_reserve(d, d->block_attention_workspace(&op));
  op.workspace = d->workspace;
  op.workspace_bytes = d->workspace_bytes;
  if (kind == ENCODE)
    DEVICE_CALL(d, causal_attention, &op);
  else
    DEVICE_CALL(d, canvas_attention, &op);
}

static void append(passes* p, int64_t layer, int64_t rows) {
  const layer_config* of = &p->model->config.layer[layer];
  const dgemma_append_to_cache op = {.batch = 1,
                                     .block_length = rows,
                                     .key_heads = of->key_heads,
                                     .head_dim = of->head_dim,
                                     .slots = 1,
                                     .capacity = p->cache[layer].capacity,
                                     .dtype = p->model->config.dtype,
                                     .key = p->key,
                                     .value = p->value,
                                     .prefix_key = p->cache[layer].keys,
                                     .prefix_value = p->cache[layer].values,
                                     .slot = p->slot,
                                     .prefix_length = p->prefix_length};
  DEVICE_CALL(p->device, append_to_cache, &op);
}

static void run_experts(passes* p, const layer_weights* w, int64_t rows) {
  const config* c = &p->model->config;
  device* d = p->device;
  dgemma_route route = {.tokens = rows,
                        .hidden_size = c->hidden_size,
                        .experts = c->experts,
                        .top_k = c->top_k,
                        .epsilon = c->epsilon,
                        .dtype = c->dtype,
                        .input = p->residual,
                        .scale = w->router_scale,
                        .projection = w->router_projection,
                        .per_expert_scale = w->router_expert_scale,
                        .expert_ids = p->expert_ids,
                        .expert_weights = p->expert_weights};
  device_reserve(d, d->route_workspace(&route));
  route.workspace = d->workspace;
  route.workspace_bytes = d->workspace_bytes;
  DEVICE_CALL(d, route, &route);
  dgemma_moe_ffn experts = {.tokens = rows,
                            .hidden_size = c->hidden_size,
                            .expert_size = c->moe_intermediate_size,
                            .experts = c->experts,
                            .top_k = c->top_k,
                            .dtype = c->dtype,
                            .input = p->sparse_input,
                            .expert_ids = p->expert_ids,
                            .expert_weights = p->expert_weights,
                            .gate_up = w->experts_gate_up,
                            .down = w->experts_down,
                            .output = p->sparse};
  device_reserve(d, d->moe_ffn_workspace(&experts));
  experts.workspace = d->workspace;
  experts.workspace_bytes = d->workspace_bytes;
  DEVICE_CALL(d, moe_ffn, &experts);
}

/* From p->hidden and its norm p->normed to the layer's output and the norm that comes next, in the
 * same places. */
static void run_layer(passes* p, int64_t layer, int64_t rows, pass_kind kind) {
  const config* c = &p->model->config;
  const layer_weights* w = &p->model->layer[layer];
  const int last = layer + 1 == c->layers;
  project(p, layer, rows);
  if (kind == ENCODE && last) { /* nobody looks at what follows the last layer's keys and values */
    append(p, layer, rows);
    return;
  }
  attend(p, layer, rows, kind);
  if (kind == ENCODE) append(p, layer, rows);
  multiply(p, p->attended, w->attention_output, rows, c->query_heads * c->layer[layer].head_dim,
           c->hidden_size, p->projected);
  const dgemma_attention_residual residual = {.tokens = rows,
                                              .hidden_size = c->hidden_size,
                                              .epsilon = c->epsilon,
                                              .dtype = c->dtype,
                                              .hidden = p->hidden,
                                              .attended = p->projected,
                                              .attended_norm = w->attended_norm,
                                              .dense_norm = w->dense_norm,
                                              .sparse_norm = w->sparse_norm,
                                              .residual = p->residual,
                                              .dense_input = p->dense_input,
                                              .sparse_input = p->sparse_input};
  DEVICE_CALL(p->device, attention_residual, &residual);
  gated_mlp(p, p->dense_input, w->gate, w->up, w->down, rows, p->dense);
  run_experts(p, w, rows);
  const dgemma_layer_output output = {
      .tokens = rows,
      .hidden_size = c->hidden_size,
      .epsilon = c->epsilon,
      .scalar = kind == ENCODE ? w->encoder_scalar : w->decoder_scalar,
      .dtype = c->dtype,
      .residual = p->residual,
      .dense = p->dense,
      .sparse = p->sparse,
      .dense_norm = w->dense_output_norm,
      .sparse_norm = w->sparse_output_norm,
      .norm = w->output_norm,
      .next_norm = last ? p->model->norm : p->model->layer[layer + 1].input_norm,
      .output = p->hidden,
      .next_input = p->normed};
  DEVICE_CALL(p->device, layer_output, &output);
}

/* The passes ----------------------------------------------------------------------------------- */

static void embed(passes* p, const int32_t* ids, int64_t rows, const void* conditioning,
                  pass_kind kind) {
  const config* c = &p->model->config;
  const dgemma_token_embedding op = {.tokens = rows,
                                     .vocabulary = c->vocabulary,
                                     .hidden_size = c->hidden_size,
                                     .scale = p->model->embedding_scale,
                                     .epsilon = c->epsilon,
                                     .normalise = kind == DENOISE,
                                     .dtype = c->dtype,
                                     .ids = ids,
                                     .embedding = p->model->embedding,
                                     .conditioning = conditioning,
                                     .output = p->hidden};
  DEVICE_CALL(p->device, token_embedding, &op);
  normalise(p, p->hidden, p->model->layer[0].input_norm, rows, p->normed);
}

void encode(passes* p, const int32_t* ids, int64_t count) {
  for (int64_t first = 0; first < count; first += ENCODE_CHUNK) {
    const int64_t rows = count - first < ENCODE_CHUNK ? count - first : ENCODE_CHUNK;
    const int32_t length = (int32_t)p->length;
    p->device->write(p->prefix_length, &length, sizeof length);
    p->device->write(p->ids, ids + first, (size_t)rows * sizeof *ids);
    fill_tables(p, rows);
    embed(p, p->ids, rows, NULL, ENCODE);
    for (int64_t i = 0; i < p->model->config.layers; ++i) run_layer(p, i, rows, ENCODE);
    p->length += rows;
  }
}

const void* denoise(passes* p, const int32_t* ids, int64_t count, const void* soft_embedding) {
  const model* m = p->model;
  const int32_t length = (int32_t)p->length;
  p->device->write(p->prefix_length, &length, sizeof length);
  fill_tables(p, count);
  if (soft_embedding != NULL) {
    normalise(p, soft_embedding, m->conditioning_norm, count, p->normed);
    gated_mlp(p, p->normed, m->conditioning_gate, m->conditioning_up, m->conditioning_down, count,
              p->conditioning);
  }
  embed(p, ids, count, soft_embedding != NULL ? p->conditioning : NULL, DENOISE);
  for (int64_t i = 0; i < m->config.layers; ++i) run_layer(p, i, count, DENOISE);
  return p->normed;
}

void passes_open(passes* p, const model* m, int64_t most_positions) {
  const config* c = &m->config;
  *p = (passes){.model = m, .device = m->device};
  p->most_rows = most_positions < ENCODE_CHUNK ? most_positions : ENCODE_CHUNK;
  if (p->most_rows < c->canvas_length) p->most_rows = c->canvas_length;
  const size_t value = dtype_bytes(c->dtype), rows = (size_t)p->most_rows;
  int64_t queries = 0, keys = 0, widest_head = 0;
  for (int64_t i = 0; i < c->layers; ++i) {
    const layer_config* of = &c->layer[i];
    layer_cache* cache = &p->cache[i];
    /* A sliding layer is a ring of what a later query can still see. */
    const int64_t seen = of->window > 1 ? of->window - 1 : 1;
    cache->capacity = of->window > 0 && seen < most_positions ? seen : most_positions;
    const int64_t width = of->key_heads * of->head_dim;
    cache->keys = device_memory(p->device, (size_t)(cache->capacity * width) * value);
    cache->values = device_memory(p->device, (size_t)(cache->capacity * width) * value);
    if (c->query_heads * of->head_dim > queries) queries = c->query_heads * of->head_dim;
    if (width > keys) keys = width;
    if (of->head_dim > widest_head) widest_head = of->head_dim;
    while (!same_rotation(&c->layer[p->table_of[i]], of)) ++p->table_of[i];
    if (p->table_of[i] != i) continue;
    p->cosine[i] = device_memory(p->device, rows * (size_t)of->head_dim * value);
    p->sine[i] = device_memory(p->device, rows * (size_t)of->head_dim * value);
  }
  p->host_cosine = allocate(rows * (size_t)widest_head * value);
  p->host_sine = allocate(rows * (size_t)widest_head * value);
  const struct {
    void** buffer;
    int64_t width;
  } buffers[] = {{&p->hidden, c->hidden_size},
                 {&p->normed, c->hidden_size},
                 {&p->raw_query, queries},
                 {&p->raw_key, keys},
                 {&p->raw_value, keys},
                 {&p->query, queries},
                 {&p->key, keys},
                 {&p->value, keys},
                 {&p->attended, queries},
                 {&p->projected, c->hidden_size},
                 {&p->residual, c->hidden_size},
                 {&p->dense_input, c->hidden_size},
                 {&p->sparse_input, c->hidden_size},
                 {&p->gate, c->intermediate_size},
                 {&p->up, c->intermediate_size},
                 {&p->activated, c->intermediate_size},
                 {&p->dense, c->hidden_size},
                 {&p->sparse, c->hidden_size},
                 {&p->conditioning, c->hidden_size}};
  for (size_t i = 0; i < sizeof buffers / sizeof *buffers; ++i)
    *buffers[i].buffer = device_memory(p->device, rows * (size_t)buffers[i].width * value);
  p->ids = device_memory(p->device, rows * sizeof *p->ids);
  p->expert_ids = device_memory(p->device, rows * (size_t)c->top_k * sizeof *p->expert_ids);
  p->expert_weights = device_memory(p->device, rows * (size_t)c->top_k * sizeof *p->expert_weights);
  p->slot = device_memory(p->device, sizeof *p->slot); /* zeroed: slot 0 */
  p->prefix_length = device_memory(p->device, sizeof *p->prefix_length);
}

void passes_close(passes* p) {
  free(p->host_cosine);
  free(p->host_sine);
}
