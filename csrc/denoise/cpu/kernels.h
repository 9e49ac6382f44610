// The interface between the C entry points and the kernels, which are compiled once per instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/denoise.h"

namespace dgemma {

// Vocabulary entries of one block of probabilities: with 256 rows 4 MiB in bf16, two of which stay
// in an L3 of 32 MiB. All threads wait for each other once per block (LOG.md has what that costs
// where a core is shared).
constexpr int64_t kProbabilityBlock = 8192;
// The distance of two rows of probabilities: one cache line more than a row, so that the six rows
// that a register tile reads do not fall into one set of the L1.
constexpr int64_t kProbabilityStride = kProbabilityBlock + 32;
// Dense rows that share one pass over the embedding.
constexpr int64_t kDenseRows = 256;
// Hidden columns of one task of the dense product.
constexpr int64_t kStripColumns = 64;

// The result of the soft embedding's first pass over a row.
struct SoftEmbeddingRow {
  float row_max;        // dtype(row_max)
  float inverse_sum;    // 1 / sum over v of exp(dtype(z[v]) - row_max)
  uint8_t needs_dense;  // 1 when the sparse way cannot serve the row, or its result did not keep
                        // the bound
};

// One call of the soft embedding, with its workspace laid out.
struct SoftEmbeddingWork {
  const dgemma_soft_embedding* op;
  SoftEmbeddingRow* rows;  // [batch * length]
  int64_t* dense_rows;     // row numbers, in increasing order
  int64_t first_dense;  // the rows of the present pass: dense_rows[first_dense ... + dense_count)
  int64_t dense_count;
  int64_t first_token;  // the vocabulary entries whose probabilities are in the workspace
  int64_t tokens;
  void* probabilities;       // [kDenseRows, kProbabilityStride], fp32 or the dtype: the variant's
  void* next_probabilities;  // the same, of the next block
  float* sums;               // [batch * length, padded_hidden]
  int64_t padded_hidden;     // hidden_size rounded up to kStripColumns
};

// Functions of a row take its number b * length + i; arrays are indexed by dgemma_dtype.
struct DenoiseKernels {
  void (*statistics[2])(const dgemma_vocabulary_statistics& op, int64_t row);
  void (*sample[2])(const dgemma_sample& op, int64_t row);
  // Soft embedding, in this order: every row once; then for each block of the vocabulary the dense
  // rows' probabilities, and the products of every strip of columns, at the same time as the next
  // block's probabilities; then the dense rows' output.
  void (*soft_sparse[2])(const SoftEmbeddingWork& work, int64_t row);
  void (*soft_probabilities[2])(const SoftEmbeddingWork& work, int64_t dense_row);
  void (*soft_strip[2])(const SoftEmbeddingWork& work, int64_t strip);
  void (*soft_write[2])(const SoftEmbeddingWork& work, int64_t row);
};

DGEMMA_DECLARE_PER_VARIANT(DenoiseKernels denoise_kernels)

}  // namespace dgemma
