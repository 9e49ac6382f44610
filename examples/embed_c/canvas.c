#include "canvas.h"

#include "common.h"

/* Every array that a step reads and writes, in device memory; a batch of one request. */
typedef struct state {
  int32_t *canvas, *draft, *argmax, *sampled, *step, *stable_steps, *status;
  int32_t *canvas_index, *max_steps, *stability_threshold;
  int64_t* seed;
  double *t_min, *t_max, *row_sum;
  float *entropy, *row_max, *tile_max, *tile_sum, *entropy_bound, *confidence_threshold;
  float *temperature, *next_temperature, *mean_entropy;
  uint8_t *active, *accepted;
  void *raw, *soft_embedding;
} state;

static void* put(device* d, const void* value, size_t bytes) {
  void* memory = device_memory(d, bytes);
  d->write(memory, value, bytes);
  return memory;
}
#define PUT(d, type, ...) put((d), &(const type){__VA_ARGS__}, sizeof(type))

static state begin(passes* p, int64_t seed, int32_t index) {
  const config* c = &p->model->config;
  device* d = p->device;
  const size_t length = (size_t)c->canvas_length, vocabulary = (size_t)c->vocabulary;
  const size_t tiles = (vocabulary + DGEMMA_VOCABULARY_TILE - 1) / DGEMMA_VOCABULARY_TILE;
  const size_t value = dtype_bytes(c->dtype);
  state s = {.canvas = device_memory(d, length * sizeof(int32_t)),
             .draft = device_memory(d, length * sizeof(int32_t)),
             .argmax = device_memory(d, length * sizeof(int32_t)),
             .sampled = device_memory(d, length * sizeof(int32_t)),
             .step = PUT(d, int32_t, 0), /* noise is drawn with step 0 */
             .stable_steps = PUT(d, int32_t, 0),
             .status = PUT(d, int32_t, 0),
             .canvas_index = PUT(d, int32_t, index),
             .max_steps = PUT(d, int32_t, c->max_steps),
             .stability_threshold = PUT(d, int32_t, c->stability_threshold),
             .seed = PUT(d, int64_t, seed),
             .t_min = PUT(d, double, c->t_min),
             .t_max = PUT(d, double, c->t_max),
             .row_sum = device_memory(d, length * sizeof(double)),
             .entropy = device_memory(d, length * sizeof(float)),
             .row_max = device_memory(d, length * sizeof(float)),
             .tile_max = device_memory(d, length * tiles * sizeof(float)),
             .tile_sum = device_memory(d, length * tiles * sizeof(float)),
             .entropy_bound = PUT(d, float, c->entropy_bound),
             .confidence_threshold = PUT(d, float, c->confidence_threshold),
             /* Step 1 of the schedule: all steps remain. */
             .temperature = PUT(d, float, (float)c->t_min + (float)(c->t_max - c->t_min)),
             .next_temperature = PUT(d, float, 0),
             .mean_entropy = PUT(d, float, 0),
             .active = PUT(d, uint8_t, 1),
             .accepted = device_memory(d, length),
             .raw = device_memory(d, length * vocabulary * value),
             .soft_embedding = device_memory(d, length * (size_t)c->hidden_size * value)};
  const dgemma_noise noise = {.batch = 1,
                              .length = c->canvas_length,
                              .vocabulary = c->vocabulary,
                              .purpose = DGEMMA_PURPOSE_INITIAL_NOISE,
                              .seed = s.seed,
                              .canvas_index = s.canvas_index,
                              .step = s.step,
                              .tokens = s.canvas};
  DEVICE_CALL(d, noise, &noise);
  d->write(s.step, &(const int32_t){1}, sizeof(int32_t));
  for (size_t i = 0; i < length; ++i) d->write(s.draft + i, &(const int32_t){-1}, sizeof(int32_t));
  return s;
}

/* The head's product with its statistics. Gives how the logits are read from then on. */
static dgemma_logits run_head(passes* p, state* s, const void* hidden) {
  const config* c = &p->model->config;
  device* d = p->device;
  const dgemma_logits logits = {.batch = 1,
                                .length = c->canvas_length,
                                .vocabulary = c->vocabulary,
                                .dtype = c->dtype,
                                .raw = s->raw,
                                .softcap = c->softcap,
                                .temperature = s->temperature};
  dgemma_vocabulary_head op = {.statistics = {.logits = logits,
                                              .argmax = s->argmax,
                                              .entropy = s->entropy,
                                              .row_max = s->row_max,
                                              .row_sum = s->row_sum,
                                              .tile_max = s->tile_max,
                                              .tile_sum = s->tile_sum},
                               .hidden_size = c->hidden_size,
                               .hidden = hidden,
                               .embedding = p->model->embedding,
                               .raw = s->raw};
  device_reserve(d, d->vocabulary_head_workspace(&op));
  op.statistics.workspace = d->workspace;
  op.statistics.workspace_bytes = d->workspace_bytes;
  DEVICE_CALL(d, vocabulary_head, &op);
  return logits;
}

static void sample(passes* p, state* s, const dgemma_logits* logits) {
  const dgemma_sample op = {.logits = *logits,
                            .row_max = s->row_max,
                            .row_sum = s->row_sum,
                            .tile_max = s->tile_max,
                            .tile_sum = s->tile_sum,
                            .seed = s->seed,
                            .canvas_index = s->canvas_index,
                            .step = s->step,
                            .tokens = s->sampled};
  DEVICE_CALL(p->device, sample, &op);
}

/* Accept, renoise, stop. */
static void update(passes* p, state* s) {
  const config* c = &p->model->config;
  const dgemma_update_canvas op = {.batch = 1,
                                   .length = c->canvas_length,
                                   .vocabulary = c->vocabulary,
                                   .sampled = s->sampled,
                                   .argmax = s->argmax,
                                   .entropy = s->entropy,
                                   .seed = s->seed,
                                   .canvas_index = s->canvas_index,
                                   .max_steps = s->max_steps,
                                   .t_min = s->t_min,
                                   .t_max = s->t_max,
                                   .entropy_bound = s->entropy_bound,
                                   .stability_threshold = s->stability_threshold,
                                   .confidence_threshold = s->confidence_threshold,
                                   .active = s->active,
                                   .canvas = s->canvas,
                                   .draft = s->draft,
                                   .stable_steps = s->stable_steps,
                                   .step = s->step,
                                   .temperature = s->next_temperature,
                                   .accepted = s->accepted,
                                   .mean_entropy = s->mean_entropy,
                                   .status = s->status};
  DEVICE_CALL(p->device, update_canvas, &op);
}

/* The next step's self-conditioning, still at this step's temperature. */
static void soften(passes* p, state* s, const dgemma_logits* logits) {
  const config* c = &p->model->config;
  device* d = p->device;
  dgemma_soft_embedding op = {.logits = *logits,
                              .row_max = s->row_max,
                              .row_sum = s->row_sum,
                              .tile_max = s->tile_max,
                              .tile_sum = s->tile_sum,
                              .hidden_size = c->hidden_size,
                              .embedding = p->model->embedding,
                              .embedding_scale = p->model->embedding_scale,
                              /* Half a unit in the last place of bfloat16; nothing in float32. */
                              .tolerance = c->dtype == DGEMMA_BFLOAT16 ? 1.0f / 512 : 0.0f,
                              .max_embedding_norm = p->model->max_embedding_norm,
                              .output = s->soft_embedding};
  device_reserve(d, d->soft_embedding_workspace(&op));
  op.workspace = d->workspace;
  op.workspace_bytes = d->workspace_bytes;
  DEVICE_CALL(d, soft_embedding, &op);
}

canvas_result denoise_canvas(passes* p, int64_t seed, int32_t index) {
  device* d = p->device;
  const int64_t length = p->model->config.canvas_length;
  state s = begin(p, seed, index);
  canvas_result result = {0};
  int32_t status = DGEMMA_CANVAS_RUNNING;
  while (status == DGEMMA_CANVAS_RUNNING) {
    const void* soft_embedding = result.steps > 0 ? s.soft_embedding : NULL;
    const dgemma_logits logits = run_head(p, &s, denoise(p, s.canvas, length, soft_embedding));
    sample(p, &s, &logits);
    update(p, &s);
    d->read(&status, s.status, sizeof status);
    ++result.steps;
    if (status == DGEMMA_CANVAS_NON_FINITE)
      die("canvas %d, step %d: a logit is not finite", index, result.steps);
    if (status == DGEMMA_CANVAS_RUNNING) soften(p, &s, &logits);
    float* const spent = s.temperature;
    s.temperature = s.next_temperature;
    s.next_temperature = spent;
  }
  result.draft = allocate((size_t)length * sizeof(int32_t));
  d->read(result.draft, s.draft, (size_t)length * sizeof(int32_t));
  return result;
}
