/* What stands between the products: token embedding, norms, residual sums, rotation, the gated
 * activation.
 *
 * Norms are x / sqrt(mean(x^2) + epsilon) * weight in fp32, rounded once to dtype; sums and
 * products beside them are rounded to dtype one by one, in the order of transformers'
 * modeling_diffusion_gemma.py. Every row is computed by itself. An output may not overlap an input.
 */
#ifndef DGEMMA_LAYER_H_
#define DGEMMA_LAYER_H_

#include "dgemma/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A pass's input, for token t with id v = ids[t]:
 *
 *   output[t] = embedding[v] * dtype(scale)         scale is sqrt(hidden_size) in this model
 *   output[t] = output[t] + conditioning[t]         where conditioning is given
 *   output[t] = norm(output[t])                     without a weight, where normalise is not 0
 *
 * each rounded to dtype. Encoding takes the first line; a canvas the last too, and from its second
 * step on all three. conditioning is self-conditioning's output: rms_norm of the soft embedding,
 * gate and up products, gelu_product, down product. */
typedef struct dgemma_token_embedding {
  int64_t tokens;
  int64_t vocabulary;
  int64_t hidden_size;
  float scale;
  float epsilon;
  int32_t normalise;
  dgemma_dtype dtype;
  const int32_t* ids;       /* [tokens] */
  const void* embedding;    /* [vocabulary, hidden_size] */
  const void* conditioning; /* [tokens, hidden_size] or NULL */
  void* output;             /* [tokens, hidden_size] */
} dgemma_token_embedding;

/* output = norm(input, weight), row by row: in front of a model's first layer, and of the soft
 * embedding. The other norms come with what stands beside them. */
typedef struct dgemma_rms_norm {
  int64_t tokens;
  int64_t hidden_size;
  float epsilon;
  dgemma_dtype dtype;
  const void* input;  /* [tokens, hidden_size] */
  const void* weight; /* [hidden_size], or NULL: 1 */
  void* output;       /* [tokens, hidden_size] */
} dgemma_rms_norm;

/* From the raw projections to what attention takes: queries and keys normalised and rotated, values
 * normalised without a weight. Rotation turns each pair (i, i + head_dim / 2) by its token's angle.
 */
typedef struct dgemma_normalise_heads {
  int64_t tokens;
  int64_t query_heads;
  int64_t key_heads;
  int64_t head_dim;
  float epsilon;
  dgemma_dtype dtype;
  const void* raw_query;  /* [tokens, query_heads, head_dim] */
  const void* raw_key;    /* [tokens, key_heads, head_dim] */
  const void* raw_value;  /* likewise, or NULL: values come from raw_key */
  const void* query_norm; /* [head_dim] */
  const void* key_norm;   /* [head_dim] */
  const void* cosine;     /* [tokens, head_dim] */
  const void* sine;       /* [tokens, head_dim] */
  void* query;            /* like the raw ones */
  void* key;
  void* value;
} dgemma_normalise_heads;

/* After attention: residual = hidden + norm(attended, attended_norm), and the inputs of the dense
 * MLP and of the experts, norm(residual, dense_norm) and norm(residual, sparse_norm). */
typedef struct dgemma_attention_residual {
  int64_t tokens;
  int64_t hidden_size;
  float epsilon;
  dgemma_dtype dtype;
  const void* hidden;        /* [tokens, hidden_size] */
  const void* attended;      /* the same */
  const void* attended_norm; /* [hidden_size] */
  const void* dense_norm;    /* [hidden_size] */
  const void* sparse_norm;   /* [hidden_size] */
  void* residual;            /* [tokens, hidden_size] */
  void* dense_input;
  void* sparse_input;
} dgemma_attention_residual;

/* output = gelu_tanh(gate) * up. */
typedef struct dgemma_gelu_product {
  int64_t values;
  dgemma_dtype dtype;
  const void* gate; /* [values] */
  const void* up;
  void* output;
} dgemma_gelu_product;

/* The end of a layer:
 *   output = (residual + norm(norm(dense, dense_norm) + norm(sparse, sparse_norm), norm)) * scalar
 * and, where next_norm is given, next_input = norm(output, next_norm). */
typedef struct dgemma_layer_output {
  int64_t tokens;
  int64_t hidden_size;
  float epsilon;
  float scalar;
  dgemma_dtype dtype;
  const void* residual; /* [tokens, hidden_size] */
  const void* dense;
  const void* sparse;
  const void* dense_norm; /* [hidden_size] */
  const void* sparse_norm;
  const void* norm;
  const void* next_norm; /* or NULL */
  void* output;          /* [tokens, hidden_size] */
  void* next_input;      /* NULL where next_norm is */
} dgemma_layer_output;

/* On the CPU: float32 and bfloat16, any size (head_dim even), tensors aligned to their elements.
 * Sums are made in one order, so every variant gives the same bits. */
DGEMMA_API dgemma_status dgemma_cpu_token_embedding(const dgemma_token_embedding* op,
                                                    dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_rms_norm(const dgemma_rms_norm* op, dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_normalise_heads(const dgemma_normalise_heads* op,
                                                    dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_attention_residual(const dgemma_attention_residual* op,
                                                       dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_gelu_product(const dgemma_gelu_product* op, dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_layer_output(const dgemma_layer_output* op, dgemma_cpu* cpu);

/* On a GPU; all pointers but the structs' are to its memory. In builds with CUDA kernels alone.
 * They take bfloat16, a hidden_size that is a multiple of 8 up to 8,192, an even head_dim up to
 * 512, and tensors aligned to 16 bytes. Ids are on the device and are not checked; one that does
 * not exist gives a row of NaN. */
DGEMMA_API dgemma_status dgemma_cuda_token_embedding(const dgemma_token_embedding* op,
                                                     dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_rms_norm(const dgemma_rms_norm* op, dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_normalise_heads(const dgemma_normalise_heads* op,
                                                     dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_attention_residual(const dgemma_attention_residual* op,
                                                        dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_gelu_product(const dgemma_gelu_product* op, dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_layer_output(const dgemma_layer_output* op, dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_LAYER_H_ */
