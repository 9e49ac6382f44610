/* The mixture-of-experts feed-forward: from the router's choice to the combined expert output. */
#ifndef DGEMMA_GROUPED_GEMM_H_
#define DGEMMA_GROUPED_GEMM_H_

#include "dgemma/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* For token t and slot k with expert e = expert_ids[t, k]:
 *
 *   h       = gelu_tanh(gate_up[e, :expert_size] . x) * (gate_up[e, expert_size:] . x)
 *   out[t]  = sum over k of expert_weights[t, k] * (down[e] . h)
 *
 * Products accumulate in fp32; h is rounded to dtype; the sum over k runs in slot order in fp32 and
 * is rounded once. A slot with expert id -1 is skipped; a token whose slots are all -1 gives zero
 * and its input is not read. A token's result does not depend on the other tokens.
 */
typedef struct dgemma_moe_ffn {
  int64_t tokens;
  int64_t hidden_size;
  int64_t expert_size; /* moe_intermediate_size */
  int64_t experts;
  int64_t top_k;
  dgemma_dtype dtype;          /* of input, gate_up, down and output */
  const void* input;           /* [tokens, hidden_size] */
  const int32_t* expert_ids;   /* [tokens, top_k], -1 or in [0, experts) */
  const float* expert_weights; /* [tokens, top_k] */
  const void* gate_up;         /* [experts, 2 * expert_size, hidden_size], gate rows first */
  const void* down;            /* [experts, hidden_size, expert_size] */
  void* output;                /* [tokens, hidden_size] */
  void* workspace;             /* 64-byte aligned */
  size_t workspace_bytes;
} dgemma_moe_ffn;

/* Bytes of workspace for these sizes and dtype; pointers are not looked at. */
DGEMMA_API size_t dgemma_cpu_moe_ffn_workspace(const dgemma_moe_ffn* op);
DGEMMA_API dgemma_status dgemma_cpu_moe_ffn(const dgemma_moe_ffn* op, dgemma_cpu* cpu);

/* The same on a GPU, of compute capability 8.0 or later; all pointers but the structs' are to its
 * memory. In builds with CUDA kernels alone. It takes bfloat16, sizes that are multiples of 8, up
 * to 1,024 experts, and tensors aligned to 16 bytes; _workspace gives 0 for other sizes. It cannot
 * look at the ids, so one that is out of range counts as -1.
 */
DGEMMA_API size_t dgemma_cuda_moe_ffn_workspace(const dgemma_moe_ffn* op);
DGEMMA_API dgemma_status dgemma_cuda_moe_ffn(const dgemma_moe_ffn* op, dgemma_cuda* cuda);

/* output = input . weight^T: every product of a row is summed in fp32 and rounded once.
 *
 * A row's bits depend neither on the other rows nor on how many there are.
 */
typedef struct dgemma_dense {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  dgemma_dtype dtype; /* of input, weight and output */
  const void* input;  /* [rows, in_features] */
  const void* weight; /* [out_features, in_features] */
  void* output;       /* [rows, out_features] */
  void* workspace;    /* 64-byte aligned; NULL where none is wanted */
  size_t workspace_bytes;
} dgemma_dense;

/* Bytes of workspace for these sizes and dtype, which may be 0; pointers are not looked at. */
DGEMMA_API size_t dgemma_cpu_dense_workspace(const dgemma_dense* op);
DGEMMA_API dgemma_status dgemma_cpu_dense(const dgemma_dense* op, dgemma_cpu* cpu);

/* On a GPU: bfloat16, features in multiples of 8 up to 65,536, tensors aligned to 16 bytes. */
DGEMMA_API size_t dgemma_cuda_dense_workspace(const dgemma_dense* op);
DGEMMA_API dgemma_status dgemma_cuda_dense(const dgemma_dense* op, dgemma_cuda* cuda);

/* A matrix [.., rows, columns] whose values take 4 or 8 bits. With r a row and k a column:
 *
 *   FP8     values e4m3, one a byte                      w = value * factor
 *   INT4    values q + 8 in 4 bits, q in [-8, 8)         w = q * scale[r, k / group] * factor
 *   NVFP4   values e2m1 in 4 bits                        w = value * scale[r, k / 16] * factor
 *   INT8    values int8, one a byte                      w = value * factor, times rounded inputs
 *
 * Of two values in a byte the even column has the low half. Rows follow each other without gaps:
 * columns (FP8, INT8) or columns / 2 bytes, and ceil(columns / group) scales. This is the layout of
 * the compressed-tensors formats float-quantized, pack-quantized, nvfp4-pack-quantized and
 * int-quantized with their experts stacked, so a checkpoint's bytes are used as they lie.
 *
 * By INT8 the inputs are rounded too, as int-quantized checkpoints with dynamic activations mean
 * it: each row of input, and of h, is divided by its largest magnitude / 127 and rounded to the
 * nearest integer (ties to even). Products are summed exactly, and multiplied by that quotient and
 * then by the factor in fp32: a sum has the same bits on every machine, CPU or GPU.
 */
typedef enum dgemma_weight_format {
  DGEMMA_WEIGHTS_FP8 = 1,
  DGEMMA_WEIGHTS_INT4 = 2,
  DGEMMA_WEIGHTS_NVFP4 = 3,
  DGEMMA_WEIGHTS_INT8 = 4
} dgemma_weight_format;

typedef struct dgemma_quantized {
  dgemma_weight_format format;
  int32_t group;      /* columns that share a scale: INT4 32, 64 or 128, NVFP4 16, FP8, INT8 0 */
  const void* values; /* 16-byte aligned on a GPU */
  const void* scales; /* INT4: of scale_dtype; NVFP4: e4m3; FP8, INT8: NULL */
  dgemma_dtype scale_dtype; /* INT4: DGEMMA_BFLOAT16 or DGEMMA_FLOAT16; else not looked at */
  const float* factors;     /* one for each rows_per_factor rows in turn; NULL stands for 1 */
  int64_t rows_per_factor;  /* a divisor of the expert_size of gate_up and of the rows of others */
} dgemma_quantized;

/* The same feed-forward with quantized weights: `ffn` with its gate_up and down NULL. A product is
 * a row of the decoded weight, rounded to dtype before or after its factor, times the input, summed
 * in fp32. Columns must be even (INT4) or a multiple of 16 (NVFP4), at most 16,384. Bytes that are
 * no finite number (e4m3's NaN) may give wrong finite ones: look for them while loading. A scale of
 * INT4 of 2^122 or more may give no number.
 */
typedef struct dgemma_moe_ffn_quantized {
  dgemma_moe_ffn ffn;
  dgemma_quantized gate_up; /* [experts, 2 * expert_size, hidden_size] */
  dgemma_quantized down;    /* [experts, hidden_size, expert_size] */
} dgemma_moe_ffn_quantized;

DGEMMA_API size_t dgemma_cpu_moe_ffn_quantized_workspace(const dgemma_moe_ffn_quantized* op);
DGEMMA_API dgemma_status dgemma_cpu_moe_ffn_quantized(const dgemma_moe_ffn_quantized* op,
                                                      dgemma_cpu* cpu);

/* On a GPU: what dgemma_cuda_moe_ffn takes, columns in multiples of 32 (INT4, NVFP4) or 16 (FP8,
 * INT8), values aligned to 16 bytes, scales and factors to 4. On Hopper a scale of INT4 of 2^28 or
 * more gives no number, and one below 2^-93 fewer bits.
 */
DGEMMA_API size_t dgemma_cuda_moe_ffn_quantized_workspace(const dgemma_moe_ffn_quantized* op);
DGEMMA_API dgemma_status dgemma_cuda_moe_ffn_quantized(const dgemma_moe_ffn_quantized* op,
                                                       dgemma_cuda* cuda);

/* The same with activations in FP8 too, as float-quantized checkpoints with dynamic activations
 * mean it: each row of input and of h is divided by its largest magnitude / 448 and rounded to
 * e4m3, and its products are multiplied by that. Both weights are FP8. For GPUs that multiply e4m3:
 * compute capability 8.9, 9.0 and 12.x, where the library was built for them (9.0 as 90a).
 * Elsewhere DGEMMA_UNSUPPORTED: dgemma_cuda_moe_ffn_quantized serves every GPU.
 */
DGEMMA_API size_t dgemma_cuda_moe_ffn_fp8_workspace(const dgemma_moe_ffn_quantized* op);
DGEMMA_API dgemma_status dgemma_cuda_moe_ffn_fp8(const dgemma_moe_ffn_quantized* op,
                                                 dgemma_cuda* cuda);

/* The dense projection likewise: `dense` with its weight NULL. */
typedef struct dgemma_dense_quantized {
  dgemma_dense dense;
  dgemma_quantized weight; /* [out_features, in_features] */
} dgemma_dense_quantized;

DGEMMA_API size_t dgemma_cpu_dense_quantized_workspace(const dgemma_dense_quantized* op);
DGEMMA_API dgemma_status dgemma_cpu_dense_quantized(const dgemma_dense_quantized* op,
                                                    dgemma_cpu* cpu);

/* On a GPU: what dgemma_cuda_dense takes, and in_features as columns above. */
DGEMMA_API size_t dgemma_cuda_dense_quantized_workspace(const dgemma_dense_quantized* op);
DGEMMA_API dgemma_status dgemma_cuda_dense_quantized(const dgemma_dense_quantized* op,
                                                     dgemma_cuda* cuda);

/* The router: which experts a token goes to, and with what weights. With x = input[t]:
 *
 *   normed    = x / sqrt(mean(x^2) + epsilon)           in fp32, rounded to dtype
 *   scaled    = (normed * scale) * hidden_size^-1/2     rounded to dtype after each product
 *   score     = projection . scaled                     in fp32, rounded to dtype
 *   p         = softmax(score)                          in fp32
 *   ids       = the top_k largest p, largest first, ties to the lower expert
 *   weights   = p[ids] / sum(p[ids]) * per_expert_scale[ids]
 *
 * as DiffusionGemma's router computes it. A token's bits do not depend on the other tokens.
 */
typedef struct dgemma_route {
  int64_t tokens;
  int64_t hidden_size;
  int64_t experts;
  int64_t top_k;
  float epsilon;
  dgemma_dtype dtype;           /* of input, scale, projection and per_expert_scale */
  const void* input;            /* [tokens, hidden_size], the residual before any norm */
  const void* scale;            /* [hidden_size] */
  const void* projection;       /* [experts, hidden_size] */
  const void* per_expert_scale; /* [experts] */
  int32_t* expert_ids;          /* [tokens, top_k] */
  float* expert_weights;        /* [tokens, top_k] */
  void* workspace;              /* 64-byte aligned */
  size_t workspace_bytes;
} dgemma_route;

/* On the CPU: float32 and bfloat16, any size, tensors aligned to their elements. Pointers are not
 * looked at for the workspace. */
DGEMMA_API size_t dgemma_cpu_route_workspace(const dgemma_route* op);
DGEMMA_API dgemma_status dgemma_cpu_route(const dgemma_route* op, dgemma_cpu* cpu);

/* The router around a product of the host's own, on the CPU: `scaled` of the above from the
 * residual, and ids and weights from p. A near tie falls as the product and the softmax of the host
 * decide. The input's squares are added up in torch's order, and so are the chosen p: all variants
 * give the bits of torch's operators (a sum of squares of eight values or more).
 */
typedef struct dgemma_router_input {
  int64_t tokens;
  int64_t hidden_size;
  float epsilon;
  dgemma_dtype dtype; /* of all tensors */
  const void* input;  /* [tokens, hidden_size], the residual before any norm */
  const void* scale;  /* [hidden_size] */
  void* output;       /* [tokens, hidden_size], what the projection multiplies */
} dgemma_router_input;

DGEMMA_API dgemma_status dgemma_cpu_router_input(const dgemma_router_input* op, dgemma_cpu* cpu);

/* NaN counts as the largest p. */
typedef struct dgemma_router_choice {
  int64_t tokens;
  int64_t experts;
  int64_t top_k;
  dgemma_dtype dtype;           /* of per_expert_scale */
  const float* probabilities;   /* [tokens, experts], over all experts */
  const void* per_expert_scale; /* [experts] */
  int32_t* expert_ids;          /* [tokens, top_k] */
  float* expert_weights;        /* [tokens, top_k] */
} dgemma_router_choice;

DGEMMA_API dgemma_status dgemma_cpu_router_choice(const dgemma_router_choice* op, dgemma_cpu* cpu);

/* `route` on a GPU: bfloat16, hidden_size a multiple of 8 up to 65,536, up to 1,024 experts, top_k
 * up to 32 and to the number of experts; input, scale and projection aligned to 16 bytes.
 */
DGEMMA_API size_t dgemma_cuda_route_workspace(const dgemma_route* op);
DGEMMA_API dgemma_status dgemma_cuda_route(const dgemma_route* op, dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_GROUPED_GEMM_H_ */
