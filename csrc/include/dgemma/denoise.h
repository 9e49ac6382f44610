/* One denoising step after the vocabulary head: statistics, sampling, acceptance, soft embedding.
 *
 * The head's product is stored once, rounded to the model's dtype: the raw logit a. Everything else
 * is recomputed from it:  z = softcap * tanh(a / softcap) / temperature  in fp32 (softcap 0: z = a
 * / temperature). A vocabulary tile is DGEMMA_VOCABULARY_TILE consecutive entries; the last may be
 * short.
 *
 * Random numbers are Philox4x32-10 with key = seed and counter = (canvas, step, position, purpose);
 * a uniform is the top 53 bits of the first two output words (the first word high) times 2^-53. So
 * a request's draws do not depend on its batch or on the device. Every drawing op also takes the
 * uniforms as an argument.
 */
#ifndef DGEMMA_DENOISE_H_
#define DGEMMA_DENOISE_H_

#include "dgemma/base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DGEMMA_VOCABULARY_TILE 128

typedef enum dgemma_purpose {
  DGEMMA_PURPOSE_INITIAL_NOISE = 0,
  DGEMMA_PURPOSE_SAMPLE = 1,
  DGEMMA_PURPOSE_RENOISE = 2
} dgemma_purpose;

/* What a request's canvas is doing, after an update. */
typedef enum dgemma_canvas_status {
  DGEMMA_CANVAS_RUNNING = 0,
  DGEMMA_CANVAS_STABLE =
      1, /* draft unchanged for long enough and mean entropy below the threshold */
  DGEMMA_CANVAS_STEP_CAP = 2,  /* max_steps steps were made */
  DGEMMA_CANVAS_NON_FINITE = 3 /* an entropy was not finite, so a logit was not */
} dgemma_canvas_status;

/* Which tokens a position may hold: bit v % 32 of mask[row, v / 32], row = row_index[b, i]; row -1
 * allows all. mask NULL allows all everywhere. A row that allows nothing is the caller's error. */
typedef struct dgemma_allowed {
  const int32_t* mask; /* [rows, ceil(vocabulary / 32)] */
  int64_t rows;
  const int32_t* row_index; /* [batch, length] */
} dgemma_allowed;

/* Logits and how to read them; shared by the three ops that do. Requests with active[b] == 0 are
 * skipped: nothing of theirs is read or written. */
typedef struct dgemma_logits {
  int64_t batch;
  int64_t length; /* canvas length */
  int64_t vocabulary;
  dgemma_dtype dtype;
  const void* raw; /* [batch, length, vocabulary] */
  float softcap;
  const float* temperature; /* [batch] */
  const uint8_t* active;    /* [batch] or NULL: all */
  dgemma_allowed allowed;
} dgemma_logits;

/* One pass over the logits. Disallowed entries take no part, whatever their logit. For tile j of a
 * row: tile_max = max z, tile_sum = sum exp(z - tile_max) (an empty tile: -infinity and 0). For the
 * row: row_max, row_sum = sum over tiles in index order, in double, of tile_sum * exp(tile_max -
 * row_max); argmax of the raw logit (lowest index on ties); entropy = log s - t / s in nats, t =
 * sum exp(z - row_max) (z - row_max). An allowed logit that is not finite makes the row's entropy
 * and row_sum NaN. */
typedef struct dgemma_vocabulary_statistics {
  dgemma_logits logits;
  int32_t* argmax; /* [batch, length] */
  float* entropy;  /* [batch, length] */
  float* row_max;  /* [batch, length] */
  double* row_sum; /* [batch, length] */
  float* tile_max; /* [batch, length, tiles] */
  float* tile_sum; /* [batch, length, tiles] */
  void* workspace; /* on a GPU: 64-byte aligned; the CPU needs none */
  size_t workspace_bytes;
} dgemma_vocabulary_statistics;

DGEMMA_API dgemma_status dgemma_cpu_vocabulary_statistics(const dgemma_vocabulary_statistics* op,
                                                          dgemma_cpu* cpu);

/* Inverse CDF in two levels with one uniform u: the first tile whose cumulative mass (double, index
 * order) exceeds u * row_sum, then inside it the first entry whose cumulative mass exceeds what is
 * left. Where rounding leaves none, the last tile or entry that has any mass. A row whose row_sum
 * is NaN gives its lowest allowed token. */
typedef struct dgemma_sample {
  dgemma_logits logits;
  const float* row_max; /* as written by vocabulary_statistics */
  const double* row_sum;
  const float* tile_max;
  const float* tile_sum;
  const int64_t* seed;         /* [batch] */
  const int32_t* canvas_index; /* [batch] */
  const int32_t* step;         /* [batch], 1 for the first */
  const double* uniforms;      /* [batch, length] in [0, 1), or NULL: drawn */
  int32_t* tokens;             /* [batch, length] */
} dgemma_sample;

DGEMMA_API dgemma_status dgemma_cpu_sample(const dgemma_sample* op, dgemma_cpu* cpu);

/* The statistics of a vocabulary that lies in shards, one after the other in the order of their
 * ids, as the ranks of tensor parallelism hold it. Each shard's are those of vocabulary_statistics
 * over its own ids, for the same request; argmax is the id in the whole vocabulary, and best the
 * raw logit there. With m = max row_max over the shards and f = exp(row_max - m) of each, in double
 * and in the order of the shards: merged_row_max = m,   merged_row_sum = S = sum f * row_sum
 *   merged_entropy = log S - t / S,   t = sum f * row_sum * (log row_sum - entropy + row_max - m)
 *   merged_argmax  = that of the shard with the greatest best (the first of equals)
 * (t is the sum of the shards' shifted sums, which an entropy and a sum tell.) The tile statistics
 * of the whole are those of the shards one after the other, where a shard is a multiple of a tile.
 *
 * One uniform u a position is drawn as sample does: owner is the first shard whose cumulative mass
 * exceeds u * S, or the last that has any, and own_uniform what is left of it inside the shard
 * `rank`, for a sample among its ids alone; 0 where another shard is the owner. share is the mass
 * of shard `rank` as a part of S.
 *
 * A shard whose nonempty is 0 has no id that the position may hold: nothing of it is read. A shard
 * whose row_sum is NaN makes the merged entropy and row_sum NaN; then the first that is not empty
 * is the owner, and share and own_uniform are 0. */
typedef struct dgemma_merge_vocabulary_shards {
  int64_t shards; /* 1 to DGEMMA_MOST_SHARDS */
  int64_t batch;
  int64_t length;
  int64_t rank;      /* 0 to shards - 1 */
  const float* best; /* [shards, batch, length], and the five that follow */
  const int32_t* argmax;
  const float* entropy;
  const float* row_max;
  const double* row_sum;
  const uint8_t* nonempty;     /* or NULL: all 1 */
  const uint8_t* active;       /* [batch] or NULL: all */
  const int64_t* seed;         /* [batch] */
  const int32_t* canvas_index; /* [batch] */
  const int32_t* step;         /* [batch] */
  const double* uniforms;      /* [batch, length] in [0, 1), or NULL: drawn */
  int32_t* merged_argmax;      /* [batch, length], and all that follow */
  float* merged_entropy;
  float* merged_row_max;
  double* merged_row_sum;
  float* share;
  int32_t* owner;
  double* own_uniform;
} dgemma_merge_vocabulary_shards;

#define DGEMMA_MOST_SHARDS 1024

DGEMMA_API dgemma_status
dgemma_cpu_merge_vocabulary_shards(const dgemma_merge_vocabulary_shards* op, dgemma_cpu* cpu);

/* Uniform tokens among the allowed: entry floor(u * count) of the allowed ids in increasing order.
 *
 * Leave `allowed` empty here and in update_canvas, also where it rules sampling: a model takes
 * noise from a few ids for text, and denoises it into more of the same. On a model of 9x9 Sudoku
 * whose answers are digits, noise from the nine digits alone costs a sixth of the solutions and
 * doubles the steps (NOTES.md of the family).
 */
typedef struct dgemma_noise {
  int64_t batch;
  int64_t length;
  int64_t vocabulary;
  dgemma_purpose purpose;
  const int64_t* seed;
  const int32_t* canvas_index;
  const int32_t* step;
  const uint8_t* active;  /* [batch] or NULL */
  const uint8_t* keep;    /* [batch, length] or NULL: positions whose token stays as it is */
  const double* uniforms; /* [batch, length] or NULL */
  dgemma_allowed allowed;
  int32_t* tokens; /* [batch, length], in and out */
} dgemma_noise;

DGEMMA_API dgemma_status dgemma_cpu_noise(const dgemma_noise* op, dgemma_cpu* cpu);

/* Accept, renoise, stop: the end of a denoising step.
 *
 * Position i is accepted when the sum of the entropies that come before it in (entropy, index)
 * order is at most entropy_bound (summed in double in that order); accepted positions take the
 * sampled token, the others a fresh uniform allowed one, drawn with the present step. Pinned
 * positions keep their canvas token, stand in the draft, and count in neither acceptance, mean
 * entropy nor stability; their sampled, argmax and entropy are not read. Then, with k =
 * stability_threshold: the canvas is stable when the draft equalled the one before it in each of
 * the last k steps (k = 0: always) and its mean entropy (summed in double in index order, stored in
 * fp32) is below confidence_threshold. A canvas that is stable, or has made max_steps steps, stops;
 * it keeps its draft. step is advanced; the temperature of the next step is
 *   t_min + (t_max - t_min) * ((max_steps - steps_done) / max_steps)
 * with t_max - t_min in double and rounded to fp32 after every operation, which is what
 * transformers' schedule does with its tensor of remaining steps.
 *
 * An entropy that is not finite: status DGEMMA_CANVAS_NON_FINITE, active cleared, nothing accepted,
 * mean_entropy NaN; all else of the request stays as it was.
 */
typedef struct dgemma_update_canvas {
  int64_t batch;
  int64_t length;
  int64_t vocabulary;
  const int32_t* sampled; /* [batch, length] */
  const int32_t* argmax;  /* [batch, length] */
  const float* entropy;   /* [batch, length] */
  const uint8_t* pinned;  /* [batch, length] or NULL */
  dgemma_allowed allowed;
  const double* uniforms; /* of the renoising, [batch, length], or NULL: drawn */
  const int64_t* seed;    /* [batch], and all that follow */
  const int32_t* canvas_index;
  const int32_t* max_steps;
  const double* t_min;
  const double* t_max;
  const float* entropy_bound;
  const int32_t* stability_threshold;
  const float* confidence_threshold;
  /* in and out */
  uint8_t* active; /* [batch]; cleared when the canvas stops */
  int32_t* canvas; /* [batch, length] */
  int32_t*
      draft; /* [batch, length]: in the previous step's, out this step's; -1 before the first */
  int32_t* stable_steps; /* [batch]: for how many steps in a row the draft has not changed */
  int32_t* step;         /* [batch] */
  float* temperature;    /* [batch] */
  /* out */
  uint8_t* accepted;   /* [batch, length] */
  float* mean_entropy; /* [batch], over the positions that are not pinned; 0 when all are */
  int32_t* status;     /* [batch], dgemma_canvas_status */
} dgemma_update_canvas;

DGEMMA_API dgemma_status dgemma_cpu_update_canvas(const dgemma_update_canvas* op, dgemma_cpu* cpu);

/* Next step's self-conditioning input: the expected embedding under this step's distribution.
 *
 *   m     = dtype(row_max),   s = sum over v of exp(dtype(z[v]) - m)
 *   p[v]  = dtype(exp(dtype(z[v]) - m) / s)
 *   out   = dtype(dtype(sum over v of p[v] * embedding[v]) * dtype(embedding_scale)),  summed in
 * fp32
 *
 * The normaliser s is not row_sum: rounding z to bf16 moves an exponent by up to 2^-8 |z|, which at
 * low temperatures is more than fp32 can hold. Pinned rows are zero; a row whose row_sum is NaN is
 * NaN. With tolerance > 0 a row may leave out entries of total mass tau when
 *   tau * (max_embedding_norm + ||sum||) <= tolerance * ||sum||,
 * checked on the computed sum; a row that fails is done densely. tolerance 0 is dense.
 */
typedef struct dgemma_soft_embedding {
  dgemma_logits logits;
  const float* row_max;
  const double* row_sum;
  const float* tile_max;
  const float* tile_sum;
  const uint8_t* pinned; /* [batch, length] or NULL */
  int64_t hidden_size;
  const void* embedding; /* [vocabulary, hidden_size] */
  float embedding_scale;
  float tolerance;
  float max_embedding_norm; /* max over v of ||embedding[v]||, before the scale */
  void* output;             /* [batch, length, hidden_size] */
  void* workspace;
  size_t workspace_bytes;
} dgemma_soft_embedding;

DGEMMA_API size_t dgemma_cpu_soft_embedding_workspace(const dgemma_soft_embedding* op);
DGEMMA_API dgemma_status dgemma_cpu_soft_embedding(const dgemma_soft_embedding* op,
                                                   dgemma_cpu* cpu);

/* The same on a GPU; all pointers but the structs' are to its memory. In builds with CUDA kernels
 * alone. They take canvases of at most 4,096 positions, and at most
 * 2^20 rows (batch x length). Values on the device (temperatures, rows of the allowed,
 * uniforms, steps) are not checked. Sums in double are made in another order than on the CPU, so a
 * draw within rounding of a boundary may fall on its other side.
 */
DGEMMA_API size_t
dgemma_cuda_vocabulary_statistics_workspace(const dgemma_vocabulary_statistics* op);
DGEMMA_API dgemma_status dgemma_cuda_vocabulary_statistics(const dgemma_vocabulary_statistics* op,
                                                           dgemma_cuda* cuda);
DGEMMA_API dgemma_status
dgemma_cuda_merge_vocabulary_shards(const dgemma_merge_vocabulary_shards* op, dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_sample(const dgemma_sample* op, dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_noise(const dgemma_noise* op, dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_update_canvas(const dgemma_update_canvas* op,
                                                   dgemma_cuda* cuda);
/* bfloat16 alone, hidden_size a multiple of 8, embedding and output aligned to 16 bytes. Whole
 * vocabulary tiles are left out, where no row of a request needs them; a row that fails the check
 * has its whole request done densely. The workspace holds the probabilities: as much as the logits.
 */
DGEMMA_API size_t dgemma_cuda_soft_embedding_workspace(const dgemma_soft_embedding* op);
DGEMMA_API dgemma_status dgemma_cuda_soft_embedding(const dgemma_soft_embedding* op,
                                                    dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_DENOISE_H_ */
