// The soft embedding in CUDA: its launch plan, its workspace and its kernels.
//
// A round is six kernels, one after the other: (1) soft_clear zeros the tables of the next kernel;
// (2) soft_select_tiles finds which vocabulary tiles each row needs, their z in bfloat16 and the
// row's normaliser; (3) soft_compact_tiles lists the tiles that any row needs; (4)
// soft_probabilities turns the listed tiles' z into probabilities in place; (5) soft_product
// multiplies them by the embedding's rows, in splits; (6) soft_finish sums the splits in order,
// checks the tolerance, scales and rounds. Where the check fails for a row, a second round of the
// same six kernels does its request again with all tiles; for the other requests they end at once.
// The host decides nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "cuda/entry.h"
#include "denoise/cuda/kernels.h"

namespace dgemma {

namespace device {
struct bfloat16;
}

// Rows and columns of a block of the product, and the depth of a stage. On sm_90 the rows are 64,
// 128 or 256, as the canvas has them (plan_head.h).
constexpr int32_t kSoftRows = 128;
constexpr int32_t kSoftColumns = 128;
constexpr int32_t kSoftDepth = 64;
// Splits of the listed tiles: with 22 column tiles of the model's canvas and its one row tile of
// 256 on sm_90, 132 blocks, one for each multiprocessor of an H200; twice as many with two row
// tiles. A constant, so that bits do not depend on a batch.
constexpr int32_t kSoftSplits = 6;

struct SoftPlan {
  CudaPath path;
  int32_t row_tile;  // rows of a block of the product
  int32_t row_tiles, column_tiles, splits;
  size_t normaliser;     // float [rows]
  size_t limit;          // float [rows]: the row skips tiles whose bound is at most this
  size_t skipped_mass;   // float [rows]: bound on the mass of the tiles that the row skips
  size_t needed;         // uint32 [batch, tiles]: not zero where any row needs the tile
  size_t list;           // int32 [batch, tiles]
  size_t count;          // int32 [batch]
  size_t failed;         // uint32 [batch]: the tolerance was not kept
  size_t probabilities;  // bfloat16 [rows, tiles * 128]: z, then probabilities, of listed tiles
  size_t partial;        // float [batch, splits, length, hidden_size]
  size_t workspace_bytes;
};

// Null when the kernels take these sizes, else what they do not take and what they want.
const char* soft_embedding_error(const dgemma_soft_embedding& op);
// The workspace is the same for every GPU.
SoftPlan make_soft_plan(const dgemma_soft_embedding& op, CudaPath path);
void print(const SoftPlan& plan, std::ostream& out);

// Arguments of the six kernels. `dense`: the second round, of requests that failed the first.
struct SoftPass {
  Logits logits;
  const float* row_max;
  const double* row_sum;
  const float *tile_max, *tile_sum;
  const uint8_t* pinned;
  const device::bfloat16* embedding;
  device::bfloat16* output;
  float *normaliser, *limit, *skipped_mass;
  uint32_t* needed;
  int32_t *list, *count;
  uint32_t* failed;
  device::bfloat16* probabilities;
  float* partial;
  float embedding_scale, tolerance, max_embedding_norm;
  int32_t hidden_size;
  bool dense;
};
SoftPass make_soft_pass(const dgemma_soft_embedding& op, const SoftPlan& plan, bool dense);

const char* launch_soft_select_tiles(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_compact_tiles(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_probabilities(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_product_sm80_bf16(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_product_sm90_bf16(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_finish(const SoftPlan& plan, const SoftPass& pass, void* stream);

}  // namespace dgemma
