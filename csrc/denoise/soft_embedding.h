// The soft embedding in CUDA: its plan, its workspace and its kernels.
//
// Per request, one after the other: (1) weigh: which vocabulary tiles each row needs, and the row's
// normaliser; (2) list: the tiles that any row needs; (3) probabilities of those tiles, in
// bfloat16, side by side; (4) their product with the embedding's rows, in splits; (5) finish:
// splits summed in order, the tolerance checked, scaled and rounded. Where the check fails for a
// row, its request is done again with all tiles by the same five kernels, which otherwise end at
// once: the host decides nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "denoise/cuda.h"

namespace dgemma {

namespace device {
struct bfloat16;
}

// Rows and columns of a block of the product, and the depth of a stage.
constexpr int32_t kSoftRows = 128;
constexpr int32_t kSoftColumns = 128;
constexpr int32_t kSoftDepth = 64;
// Splits of the listed tiles: with 22 column tiles and two row tiles of the model's canvas, 264
// blocks, two for each multiprocessor of an H200. A constant, so that bits do not depend on a
// batch.
constexpr int32_t kSoftSplits = 6;

struct SoftPlan {
  int32_t row_tiles, column_tiles, splits;
  size_t normaliser;     // float [rows]
  size_t left_out;       // float [rows]: bound on the mass that the row's tiles leave out
  size_t wanted;         // uint32 [batch, tiles]: not zero where a row needs the tile
  size_t list;           // int32 [batch, tiles]
  size_t count;          // int32 [batch]
  size_t failed;         // uint32 [batch]: the tolerance was not kept
  size_t probabilities;  // bfloat16 [rows, tiles * 128]
  size_t partial;        // float [batch, splits, length, hidden_size]
  size_t workspace_bytes;
};

// Null when the kernels take these sizes, else what they do not take and what they want.
const char* soft_embedding_problem(const dgemma_soft_embedding& op);
SoftPlan make_soft_plan(const dgemma_soft_embedding& op);
void print(const SoftPlan& plan, std::ostream& out);

// Arguments of the five kernels. `dense`: the second round, of requests that failed the first.
struct SoftPass {
  Logits logits;
  const float* row_max;
  const double* row_sum;
  const float* tile_max;
  const uint8_t* pinned;
  const device::bfloat16* embedding;
  device::bfloat16* output;
  float *normaliser, *left_out;
  uint32_t* wanted;
  int32_t *list, *count;
  uint32_t* failed;
  device::bfloat16* probabilities;
  float* partial;
  float embedding_scale, tolerance, max_embedding_norm;
  int32_t hidden_size;
  bool dense;
};
SoftPass make_soft_pass(const dgemma_soft_embedding& op, const SoftPlan& plan, bool dense);

const char* launch_soft_weigh(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_list(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_probabilities(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_product_sm80_bf16(const SoftPlan& plan, const SoftPass& pass, void* stream);
const char* launch_soft_finish(const SoftPlan& plan, const SoftPass& pass, void* stream);

}  // namespace dgemma
