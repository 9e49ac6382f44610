/* A canvas that an automaton over tokens accepts: the joint draw, the draft and the entropies of a
 * denoising step, given that.
 *
 * Tokens with the same effect on all states are a class; class 0 leads nowhere. Classes that lead
 * from one state to the same other are a set, and an arc has one. The automata of a batch lie in
 * one arena of int32; a request's descriptor says where. The order of a step is: the vocabulary
 * statistics and sample of denoise.h, class_statistics, constrain, sample_class, update_canvas.
 * Requests without an automaton are left as they are.
 */
#ifndef DGEMMA_AUTOMATON_H_
#define DGEMMA_AUTOMATON_H_

#include "dgemma/denoise.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The words of a descriptor: counts, and where each array begins in the arena. states 0: no
 * automaton, and nothing else is read. */
typedef enum dgemma_automaton_word {
  DGEMMA_AUTOMATON_STATES = 0,
  DGEMMA_AUTOMATON_CLASSES = 1,
  DGEMMA_AUTOMATON_SETS = 2,
  DGEMMA_AUTOMATON_ARCS = 3,
  DGEMMA_AUTOMATON_CLASS_OF_TOKEN = 4, /* [vocabulary] */
  DGEMMA_AUTOMATON_SET_BEGIN = 5,      /* [sets + 1], into SET_CLASS */
  DGEMMA_AUTOMATON_SET_CLASS = 6,
  DGEMMA_AUTOMATON_OUT_BEGIN = 7, /* [states + 1]: arcs by source */
  DGEMMA_AUTOMATON_OUT_TARGET = 8,
  DGEMMA_AUTOMATON_OUT_SET = 9,
  DGEMMA_AUTOMATON_IN_BEGIN = 10, /* [states + 1]: the same arcs by target */
  DGEMMA_AUTOMATON_IN_SOURCE = 11,
  DGEMMA_AUTOMATON_IN_SET = 12,
  DGEMMA_AUTOMATON_DISTANCE = 13, /* [states]: the fewest tokens after which the text may end */
  DGEMMA_AUTOMATON_CLOSING = 14, /* [states]: the fewest after which an open part is closed, 0 where
                                    none is open; where the word itself is 0, no part opens */
  DGEMMA_AUTOMATON_CLOSING_LEFT = 15, /* a count: no part is open after so many tokens */
  DGEMMA_AUTOMATON_TOKEN_BEGIN = 16,  /* [classes + 1], into TOKENS */
  DGEMMA_AUTOMATON_TOKENS = 17        /* [vocabulary]: the tokens by class, and by id within it */
} dgemma_automaton_word;
#define DGEMMA_AUTOMATON_WORDS 18

/* Of every row and class: the greatest z, the entry with the greatest raw logit (ties to the lowest
 * id), mass = sum exp(z - class_max) and shifted = sum exp(z - class_max) (z - class_max). A class
 * without an entry that is allowed: -infinity, -1, 0, 0. Where a position is pinned its token alone
 * takes part, with z 0. */
typedef struct dgemma_class_statistics {
  dgemma_logits logits;
  int64_t arena_words;
  const int32_t* arena;
  const int64_t* descriptor; /* [batch, DGEMMA_AUTOMATON_WORDS] */
  const uint8_t* pinned;     /* [batch, length] or NULL */
  const int32_t* canvas;     /* [batch, length]: the tokens of pinned positions */
  int64_t most_classes;
  float* class_max;      /* [batch, length, most_classes] */
  int32_t* class_argmax; /* the same, and so below */
  double* class_mass;
  double* class_shifted;
} dgemma_class_statistics;

DGEMMA_API dgemma_status dgemma_cpu_class_statistics(const dgemma_class_statistics* op,
                                                     dgemma_cpu* cpu);

/* Conditions a canvas on its automaton: it leads from `state` to a state from which a text may end
 * within `tokens_left` more tokens. After i of its tokens, 0 to `length`, it is in no state whose
 * open part needs more than CLOSING_LEFT - i tokens to be closed.
 *
 *   draw     a class for every position, from the product of the rows' distributions given that the
 *            automaton accepts; of each position's uniform, `remainder` is left for the token
 *   argmax   the canvas with the greatest product that is accepted (ties to the lowest id)
 *   entropy  max(H, s * entropy), s = (max_steps - step + 1) / max_steps, with H the entropy of a
 *            position's distribution given that the automaton accepts. Where it weighs all classes
 *            alike, H is the row's own entropy
 *
 * Sums are mantissas and exponents of two, so nothing underflows, and are made in one order. A
 * request for which no canvas is accepted has matches 0; it, and one whose entropies are not all
 * finite (matches 1), stay as they are otherwise. */
typedef struct dgemma_constrain {
  int64_t batch;
  int64_t length;
  int64_t arena_words;
  const int32_t* arena;
  const int64_t* descriptor;
  int64_t most_classes;
  int64_t most_states; /* of the automata of the batch, and so below */
  int64_t most_sets;
  const float* class_max; /* as written by class_statistics */
  const int32_t* class_argmax;
  const double* class_mass;
  const double* class_shifted;
  const uint8_t* pinned;      /* [batch, length] or NULL: their entropies are not read */
  const uint8_t* active;      /* [batch] or NULL: all */
  const int32_t* state;       /* [batch] */
  const int32_t* tokens_left; /* [batch] */
  const int32_t* max_steps;   /* [batch] */
  const int64_t* seed;        /* [batch] */
  const int32_t* canvas_index;
  const int32_t* step;
  const double* uniforms; /* [batch, length] or NULL: drawn as those of `sample` */
  int32_t* argmax;        /* [batch, length], in and out */
  float* entropy;         /* [batch, length], in and out */
  int32_t* chosen_class;  /* [batch, length] */
  double* remainder;      /* [batch, length] in [0, 1) */
  int32_t* matches;       /* [batch] */
  void* workspace;
  size_t workspace_bytes;
} dgemma_constrain;

DGEMMA_API size_t dgemma_cpu_constrain_workspace(const dgemma_constrain* op);
DGEMMA_API dgemma_status dgemma_cpu_constrain(const dgemma_constrain* op, dgemma_cpu* cpu);

/* The token inside the chosen class, as `sample` draws one with the remainder as its uniform where
 * the class's tokens alone are allowed. Written for requests with an automaton and matches 1, but
 * for pinned positions. */
typedef struct dgemma_sample_class {
  dgemma_logits logits;
  int64_t arena_words;
  const int32_t* arena;
  const int64_t* descriptor;
  const uint8_t* pinned;
  const int32_t* chosen_class;
  const double* remainder;
  const int32_t* matches;
  int32_t* tokens; /* [batch, length], in and out */
  void* workspace;
  size_t workspace_bytes;
} dgemma_sample_class;

DGEMMA_API size_t dgemma_cpu_sample_class_workspace(const dgemma_sample_class* op);
DGEMMA_API dgemma_status dgemma_cpu_sample_class(const dgemma_sample_class* op, dgemma_cpu* cpu);

/* The same on a GPU; all pointers but the structs' are to its memory, the descriptors too. In
 * builds with CUDA kernels alone. They take canvases of at most 4,096 positions, at most 2^20 rows
 * (batch x length) and automata of at most 4,096 classes. Values on the device (the arena,
 * descriptors, states, steps, uniforms, pinned tokens) are not checked: an automaton has at most
 * the states, classes and sets that the struct says. A class's sums are integers of 62 bits over
 * the vocabulary, in units of at most 2^-31; sums over states and draws are as on the CPU but for
 * the rounding of exponentials, so a draw within rounding of a boundary may fall on its other side.
 */
DGEMMA_API dgemma_status dgemma_cuda_class_statistics(const dgemma_class_statistics* op,
                                                      dgemma_cuda* cuda);
DGEMMA_API size_t dgemma_cuda_constrain_workspace(const dgemma_constrain* op);
DGEMMA_API dgemma_status dgemma_cuda_constrain(const dgemma_constrain* op, dgemma_cuda* cuda);
DGEMMA_API size_t dgemma_cuda_sample_class_workspace(const dgemma_sample_class* op);
DGEMMA_API dgemma_status dgemma_cuda_sample_class(const dgemma_sample_class* op, dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_AUTOMATON_H_ */
