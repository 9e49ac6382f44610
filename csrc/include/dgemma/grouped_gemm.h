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

/* The same on a GPU; all pointers but the structs' are to its memory. In builds with CUDA kernels
 * alone. It takes bfloat16, sizes that are multiples of 8, up to 1,024 experts, and tensors aligned
 * to 16 bytes; _workspace gives 0 for other sizes. It cannot look at the ids, so one that is out of
 * range counts as -1.
 */
DGEMMA_API size_t dgemma_cuda_moe_ffn_workspace(const dgemma_moe_ffn* op);
DGEMMA_API dgemma_status dgemma_cuda_moe_ffn(const dgemma_moe_ffn* op, dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_GROUPED_GEMM_H_ */
