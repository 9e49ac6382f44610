// The listed tiles' probabilities times the embedding's rows, bfloat16 to fp32 on sm_90: see
// sm90/bf16_ring.h and plan_soft_embedding.h.
//
// A block has 128 columns of the embedding, up to 256 rows of a request and a split of the list.
// The embedding is read as it lies, vocabulary entry by entry: columns run along its lines, which
// wgmma takes as an m-major A. All that runs through a block is one product, stored at its end.
#include "common/ceil_divide.h"
#include "denoise/cuda/soft_tiles.h"
#include "denoise/sm90/bf16_ring.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

using namespace vocabulary_sm90;

static_assert(kTile % kStageDepth == 0 && kSoftColumns == kTileRows);
// Two consumer warpgroups and a third, of which one warp loads.
constexpr uint32_t kThreads = 384;
using sm90::Registers;
static_assert(Registers::kThreads == kThreads);

struct NoExtra {};

struct Blocks {
  int32_t row_tiles, splits;
};

// A block's part of the product; the same for both blocks of a cluster but for the column.
struct Part {
  int32_t request, split;
  int32_t begin, end;  // of the list
  int32_t first_row, first_column;
};

template <int kRows>
DGEMMA_DEVICE Part find_part(const SoftPass& p, const Blocks& b) {
  Part part;
  part.request = static_cast<int32_t>(blockIdx.z);
  part.split = static_cast<int32_t>(blockIdx.y);
  const int32_t count = p.count[part.request], each = ceil_divide(count, b.splits);
  part.begin = part.split * each;
  part.end = min(part.begin + each, count);
  // Row tiles of the same columns side by side, so that they find the embedding in the L2.
  const int32_t cluster = static_cast<int32_t>(blockIdx.x / kClusterBlocks);
  part.first_row = cluster % b.row_tiles * kRows;
  part.first_column = (cluster / b.row_tiles * static_cast<int32_t>(kClusterBlocks) +
                       static_cast<int32_t>(device::cluster_block_rank())) *
                      kSoftColumns;
  return part;
}

// One thread calls this.
template <int kRows>
DGEMMA_DEVICE void load(Ring<kRows, NoExtra>& ring, const device::TensorMap* embedding,
                        const device::TensorMap* probabilities, const SoftPass& p, const Blocks& b,
                        const Part& part) {
  const auto embedding_policy =
      b.row_tiles * p.logits.batch == 1 ? device::evict_first() : device::evict_normal();
  const auto row_policy = device::evict_normal();  // eleven clusters of the model's 22 column tiles
  const int32_t* const list = p.list + static_cast<int64_t>(part.request) * p.logits.tiles;
  typename Ring<kRows, NoExtra>::State state;
  for (int32_t at = part.begin; at < part.end; ++at) {
    const int32_t token = list[at] * kTile;
#pragma unroll 1
    for (int32_t depth = 0; depth < kTile; depth += kStageDepth)
      fill(ring, state, probabilities, token + depth, part.first_row, part.request, row_policy,
           [&](auto& stage, device::Mbarrier* full) {
#pragma unroll
             for (int32_t half = 0; half < 2; ++half)
               device::tma_load(stage.embedding[half], embedding, full, embedding_policy,
                                part.first_column + half * kWarpgroupRows, token + depth);
           });
  }
}

// A thread has, of column l / 4 of its warp's 16 and the eighth after it, pairs of rows.
template <int kRows>
DGEMMA_DEVICE void store(const SoftPass& p, const Blocks& b, const Part& part,
                         const float (&sum)[kRows / 2]) {
  const int32_t lane = static_cast<int32_t>(device::lane_index()), length = p.logits.length;
  const int32_t column =
      part.first_column + 16 * static_cast<int32_t>(device::warp_index()) + lane / 4;
  const int32_t row = part.first_row + 2 * (lane % 4);
  const int64_t width = p.hidden_size;
  float* const to =
      p.partial +
      ((static_cast<int64_t>(part.request) * b.splits + part.split) * length + row) * width +
      column;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int32_t down = 8 * (i / 4) + i % 2, right = 8 * (i / 2 % 2);
    if (row + down < length && column + right < width) to[down * width + right] = sum[i];
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    soft_product(const __grid_constant__ device::TensorMap embedding,
                 const __grid_constant__ device::TensorMap probabilities, const SoftPass p,
                 const Blocks b) {
  auto& ring = device::shared_memory<Ring<kRows, NoExtra>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&embedding);
    device::prefetch_tensor_map(&probabilities);
    initialise(ring);
    device::fence_mbarrier_init();
  }
  device::cluster_sync();
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  if (!is_in_round(p, blockIdx.z)) return;
  const Part part = find_part<kRows>(p, b);
  if (part.begin >= part.end) return;  // soft_finish skips such a split

  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) load(ring, &embedding, &probabilities, p, b, part);
      __syncwarp();
    }
  } else {
    Registers::take();
    float sum[kRows / 2];
    typename Ring<kRows, NoExtra>::State at;
    multiply<Major::mn>(ring, at, (part.end - part.begin) * (kTile / kStageDepth), sum);
    store<kRows>(p, b, part, sum);
  }
  device::cluster_sync();  // the other block arrives at this one's barriers until it ends
}

// [vocabulary, hidden_size], 64 columns of 64 entries at a time. What lies past either end is zero.
device::TensorLayout embedding_layout(const SoftPass& pass) {
  const uint64_t width = static_cast<uint64_t>(pass.hidden_size);
  return {.type = device::ElementType::bfloat16,
          .rank = 2,
          .base = pass.embedding,
          .size = {width, static_cast<uint64_t>(pass.logits.vocabulary)},
          .stride = {0, width * sizeof(bfloat16)},
          .box = {kWarpgroupRows, kStageDepth},
          .swizzle = Swizzle::bytes_128};
}

// [batch, length, tiles * 128], half a row tile at a time. Past a request's last row it is zero.
device::TensorLayout probabilities_layout(const SoftPass& pass, int32_t row_tile) {
  const uint64_t width = static_cast<uint64_t>(pass.logits.tiles) * kTile;
  const uint64_t length = static_cast<uint64_t>(pass.logits.length);
  return {.type = device::ElementType::bfloat16,
          .rank = 3,
          .base = pass.probabilities,
          .size = {width, length, static_cast<uint64_t>(pass.logits.batch)},
          .stride = {0, width * sizeof(bfloat16), width * sizeof(bfloat16) * length},
          .box = {kStageDepth, static_cast<uint32_t>(row_tile) / kClusterBlocks, 1},
          .swizzle = Swizzle::bytes_128};
}

template <int kRows>
const char* launch(const SoftPlan& plan, const SoftPass& pass, void* stream) {
  using Shared = Ring<kRows, NoExtra>;
  static_assert(sizeof(Shared) <= kSharedLimit90);
  device::TensorMap embedding, probabilities;
  if (const char* error = device::encode_tensor_map(&embedding, embedding_layout(pass)))
    return error;
  if (const char* error =
          device::encode_tensor_map(&probabilities, probabilities_layout(pass, kRows)))
    return error;
  const int32_t pairs = (plan.column_tiles + 1) / 2;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(pairs * plan.row_tiles) * kClusterBlocks,
                   static_cast<unsigned>(plan.splits), static_cast<unsigned>(pass.logits.batch)),
      .threads = kThreads,
      .shared_bytes = sizeof(Shared),
      .cluster_blocks = kClusterBlocks,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_product<kRows>, embedding, probabilities, pass,
                        Blocks{plan.row_tiles, plan.splits});
}

}  // namespace

const char* launch_soft_product_sm90_bf16(const SoftPlan& plan, const SoftPass& pass,
                                          void* stream) {
  if (plan.row_tile == 64) return launch<64>(plan, pass, stream);
  if (plan.row_tile == 128) return launch<128>(plan, pass, stream);
  return launch<256>(plan, pass, stream);
}

}  // namespace dgemma
