/* The vocabulary head of a denoising step: its product and the statistics of it in one pass. */
#ifndef DGEMMA_VOCABULARY_HEAD_H_
#define DGEMMA_VOCABULARY_HEAD_H_

#include "dgemma/denoise.h"

#ifdef __cplusplus
extern "C" {
#endif

/* raw[b, i, v] = dtype(sum over h of hidden[b, i, h] * embedding[v, h]), summed in fp32 and rounded
 * once; then vocabulary_statistics of what was stored. Of `statistics`, logits.raw is not looked at
 * (raw takes its place), and the workspace holds its tiles' parts. Requests that are not active are
 * neither read nor written. */
typedef struct dgemma_vocabulary_head {
  dgemma_vocabulary_statistics statistics;
  int64_t hidden_size;
  const void* hidden;    /* [batch, length, hidden_size], normalised */
  const void* embedding; /* [vocabulary, hidden_size] */
  void* raw;             /* [batch, length, vocabulary] */
} dgemma_vocabulary_head;

/* On the CPU: float32 and bfloat16, any size, tensors aligned to their elements, no workspace. */
DGEMMA_API size_t dgemma_cpu_vocabulary_head_workspace(const dgemma_vocabulary_head* op);
DGEMMA_API dgemma_status dgemma_cpu_vocabulary_head(const dgemma_vocabulary_head* op,
                                                    dgemma_cpu* cpu);

/* On a GPU; all pointers but the structs' are to its memory. In builds with CUDA kernels alone. It
 * takes bfloat16, a hidden_size that is a multiple of 8, and tensors aligned to 16 bytes. */
DGEMMA_API size_t dgemma_cuda_vocabulary_head_workspace(const dgemma_vocabulary_head* op);
DGEMMA_API dgemma_status dgemma_cuda_vocabulary_head(const dgemma_vocabulary_head* op,
                                                     dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_VOCABULARY_HEAD_H_ */
