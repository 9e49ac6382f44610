#include "block_attention/cuda/plan.h"

#include <algorithm>
#include <ostream>

#include "block_attention/cuda/splits.h"
#include "common/ceil_divide.h"

namespace dgemma {
namespace {

constexpr int32_t kHeadDims[] = {16, 32, 64, 128, 256, 512};
// A whole GB202, the largest chip from compute capability 8.0 to 12.0.
constexpr int32_t kMostMultiprocessors = 192;

bool outside(int64_t value, int64_t least, int64_t most) { return value < least || value > most; }

// What both forms have. Grid extents, and products that stay within 32 bits.
template <typename Operation>
const char* extents_error(const Operation& op) {
  if (op.dtype != DGEMMA_BFLOAT16) return "dtype: wants bfloat16";
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), op.head_dim) == std::end(kHeadDims))
    return "head_dim: wants 16, 32, 64, 128, 256 or 512";
  if (outside(op.key_heads, 1, 1024)) return "key_heads: wants 1 to 1024";
  if (outside(op.query_heads, 1, 1024) || op.query_heads % op.key_heads != 0)
    return "query_heads: wants a multiple of key_heads up to 1024";
  if (outside(op.window, 0, INT32_MAX)) return "window: wants 0 to 2147483647";
  if (outside(op.spans_per_request, 0, INT32_MAX)) return "spans_per_request: wants 0 or more";
  return nullptr;
}

}  // namespace

const char* attention_cuda_error(const dgemma_block_attention& op) {
  if (const char* error = extents_error(op)) return error;
  if (outside(op.batch, 0, 65535)) return "batch: wants 0 to 65535";
  if (outside(op.block_length, 0, 1 << 20)) return "block_length: wants 0 to 1048576";
  if (outside(op.slots, 0, INT32_MAX)) return "slots: wants 0 to 2147483647";
  if (outside(op.capacity, 0, INT32_MAX)) return "capacity: wants 0 to 2147483647";
  return nullptr;
}

const char* attention_cuda_error(const dgemma_paged_attention& op) {
  if (const char* error = extents_error(op)) return error;
  if (outside(op.requests, 0, 65535)) return "requests: wants 0 to 65535";
  if (outside(op.max_query_length, 0, 1 << 20)) return "max_query_length: wants 0 to 1048576";
  return nullptr;
}

const char* pages_cuda_error(const dgemma_paged_attention& op) {
  if (outside(op.tokens, 0, INT32_MAX)) return "tokens: wants 0 to 2147483647";
  if (outside(op.pages, 0, INT32_MAX)) return "pages: wants 0 to 2147483647";
  if (outside(op.page_size, 1, 1 << 20)) return "page_size: wants 1 to 1048576";
  if (outside(op.pages_per_request, 0, INT32_MAX))
    return "pages_per_request: wants 0 to 2147483647";
  return nullptr;
}

AttentionPlan make_attention_plan(const AttentionExtents& extents, const Gpu& gpu,
                                  Filling filling) {
  AttentionPlan plan = {};
  plan.path = extents.head_dim == 256 || extents.head_dim == 512 ? gpu.path : CudaPath::kSm80;
  int64_t fill = std::clamp(gpu.multiprocessors, 1, kMostMultiprocessors);
  if (plan.path == CudaPath::kSm90) {
    // See sm90/bf16_keys.h.
    plan.rows = extents.head_dim == 512 ? 64 : 128;
    plan.keys = extents.head_dim == 512 ? 64 : 80;
    plan.blocks_at_once = 1;
  } else {
    // 512 columns are two warps' side by side, so four warps have 32 rows, else 64. Tiles of 32
    // keys keep the widest heads within 99 KB, which is what a block may have on 8.6, 8.9 and 12.0.
    plan.rows = extents.head_dim == 512 ? 32 : 64;
    plan.keys = extents.head_dim >= 256 ? 32 : 64;
    // Where two do not fit at once they follow one another, and splits make two waves.
    fill *= kMostBlocks80;
    const int32_t bytes =
        attention_shared_bytes_80(static_cast<int32_t>(extents.head_dim), plan.rows, plan.keys) +
        kSharedReserved;
    plan.blocks_at_once = std::clamp(shared_bytes_of_multiprocessor(gpu.compute_capability) / bytes,
                                     1, kMostBlocks80);
  }
  if (filling == Filling::kByBatch)
    fill = std::max<int64_t>(1, fill / std::max<int64_t>(1, extents.requests));
  plan.blocks_wanted = static_cast<int32_t>(fill);
  const int64_t rows = extents.rows * (extents.query_heads / extents.key_heads);
  plan.row_tiles = static_cast<int32_t>(ceil_divide(rows, plan.rows));
  const int64_t blocks = std::max<int64_t>(1, plan.row_tiles * extents.key_heads);
  // A shorter request has fewer tiles and so more splits; together they stay within the blocks
  // wanted.
  plan.splits =
      extents.own_lengths
          ? std::min(kMostSplits, plan.blocks_wanted)
          : attention_splits(plan.blocks_wanted,
                             static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX)), INT32_MAX);
  plan.partial_tiles =
      plan.splits > 1 ? std::min<int64_t>(blocks * kMostSplits, plan.blocks_wanted) : 0;
  if (plan.splits > 1)  // a warp has a query of a head
    plan.combine_blocks = static_cast<int32_t>(
        ceil_divide(extents.rows * extents.query_heads, int64_t{kCombineThreads / 32}));
  const int64_t tiles = extents.requests * plan.partial_tiles;
  WorkspaceParts parts;
  plan.partial = parts.take<float>(tiles * plan.rows * extents.head_dim);
  plan.sums = parts.take<float>(tiles * plan.rows * 2);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

size_t attention_workspace_bytes(const AttentionExtents& extents) {
  size_t most = 0;
  for (const CudaPath path : {CudaPath::kSm80, CudaPath::kSm90}) {
    const Gpu gpu = {path, 0, kMostMultiprocessors};
    most = std::max(most, make_attention_plan(extents, gpu, Filling::kByRequest).workspace_bytes);
  }
  return most;
}

void print(const AttentionPlan& plan, std::ostream& out) {
  out << (plan.path == CudaPath::kSm90 ? "sm90" : "sm80") << " attention: " << plan.row_tiles
      << " tiles of " << plan.rows << " rows, tiles of " << plan.keys << " keys, up to "
      << plan.splits << " splits towards " << plan.blocks_wanted << " blocks of a request, "
      << plan.blocks_at_once << " at once on a multiprocessor\n";
  if (plan.splits > 1)
    out << "combine: " << plan.combine_blocks << " blocks of " << kCombineThreads
        << " threads for a request\n";
  out << "workspace: " << plan.workspace_bytes << " bytes\n";
}

}  // namespace dgemma
