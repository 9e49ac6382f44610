// The launch plan of a dense projection in CUDA: a weight matrix by rows of input, cut along k into
// segments whose number depends on the matrix alone.
//
// A row's result is the sum of its segments in their order. A few rows do not fill a GPU, so there
// every segment of a tile is a work tile of its own, and another kernel adds them; with many rows a
// work tile takes all segments of its tile in turn. Both add the same numbers in the same order: a
// row's bits do not depend on how many rows there are. Pure host code that allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "cuda/entry.h"
#include "cuda/occupancy.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/plan_rows.h"

namespace dgemma {

constexpr int32_t kSumSegmentsThreads = 128;
static_assert(fills_multiprocessor(kSumSegmentsThreads));

struct DensePlan {
  CudaPath path;
  int32_t token_tile;   // rows of input in a work tile
  int32_t weight_rows;  // of a weight tile
  int32_t threads;
  int32_t stages, stage_bytes;
  int32_t weight_tiles, token_tiles, k_steps, segments;
  bool apart;  // a work tile for every segment, and a kernel that adds them
  int32_t blocks, sum_blocks;
  int32_t blocks_at_once;  // of a multiprocessor; the grid of the product counts on them
  RowsPlan input_rows;     // int8 [rows, in_features], where the weight is INT8
  size_t workspace_bytes;  // float32 or int32 [segments, rows, out_features] when apart, then these
};

// Null when the CUDA kernels take these sizes and this dtype, else what they want instead.
const char* dense_error(const dgemma_dense& op);

// Plans sizes that have no error and at least one row. The workspace is the same for every GPU.
DensePlan make_dense_plan(const dgemma_dense& op, const Gpu& gpu);

// A line for each kernel and one for the workspace.
void print(const DensePlan& plan, std::ostream& out);

}  // namespace dgemma
