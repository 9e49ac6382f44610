// The launch plan of the CUDA kernels: everything that depends on the extents of a call and on the
// GPU alone. The device finds the splits of a request from the request's own lengths and the number
// of blocks that are wanted of it (splits.h). Pure host code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "block_attention/extents.h"
#include "cuda/entry.h"
#include "cuda/occupancy.h"
#include "dgemma/block_attention.h"

namespace dgemma {

// sm_80: four warps of 16 rows, mma's M.
constexpr int32_t kAttentionThreads = 128;
// sm_90: two consumer warpgroups and one of producers.
constexpr int32_t kAttentionThreads90 = 384;
constexpr int32_t kCombineThreads = 128;
static_assert(fills_multiprocessor(kCombineThreads));

// sm_80: the shared memory of a block: queries, keys and values in rows that 16 bytes keep apart,
// and what each row of queries sees. Three blocks would have 168 registers for each thread, of
// which the kernels use up to 255.
constexpr int32_t attention_shared_bytes_80(int32_t head_dim, int32_t rows, int32_t keys) {
  return (rows + 2 * keys) * (head_dim + 8) * 2 + rows * 2 * 4;
}
constexpr int32_t kMostBlocks80 = 2;

// Where the blocks come from that fill the GPU: each request makes them for itself, so that it has
// the same bits in any batch, or the requests of the batch together.
enum class Filling { kByRequest, kByBatch };

struct AttentionPlan {
  CudaPath path;           // kSm90 for head dimensions 256 and 512 on a Hopper
  int32_t rows;            // of a tile of queries
  int32_t keys;            // of a tile of keys
  int32_t row_tiles;       // that a request has at most
  int32_t splits;          // likewise
  int32_t blocks_wanted;   // the blocks that splits are to make of a request
  int32_t blocks_at_once;  // that surely fit a multiprocessor
  int64_t partial_tiles;   // row tiles times splits at most, where there is more than one split
  int32_t combine_blocks;  // of a request, there too
  size_t partial;          // float [batch, partial_tiles, rows, head_dim], before the division
  size_t sums;             // float [batch, partial_tiles, rows, 2]: maximum and sum of a row
  size_t workspace_bytes;
};

// Null when the kernels take these extents and this dtype, else what they do not take and what they
// want. Pointers are not checked.
const char* attention_cuda_error(const dgemma_block_attention& op);
const char* attention_cuda_error(const dgemma_paged_attention& op);
// The same of what the workspace does not depend on.
const char* pages_cuda_error(const dgemma_paged_attention& op);
AttentionPlan make_attention_plan(const AttentionExtents& extents, const Gpu& gpu, Filling filling);
// Enough for every GPU and either filling.
size_t attention_workspace_bytes(const AttentionExtents& extents);
void print(const AttentionPlan& plan, std::ostream& out);

}  // namespace dgemma
