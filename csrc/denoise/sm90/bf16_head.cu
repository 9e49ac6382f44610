// The vocabulary head, bfloat16 on sm_90: see sm90/bf16_ring.h and plan_head.h.
//
// Blocks are persistent. Warps 0-7 multiply a tile, round it into shared memory and go on with the
// next; meanwhile warps 9-11 store it and make its statistics, which would otherwise keep the
// tensor cores waiting for a quarter of the time. The last tile of a block is finished by all of
// them. Warp 8 loads.
#include "common/ceil_divide.h"
#include "denoise/cuda/head_epilogue.h"
#include "denoise/cuda/plan_head.h"
#include "denoise/sm90/bf16_ring.h"
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

using namespace vocabulary_sm90;

static_assert(kTileRows == kTile);
constexpr int32_t kFinishingWarps = kHeadThreads / 32 - kConsumerWarps - 1;
// The warps that do not multiply finish tiles: they need more than loaders do. 128 of the 192 are
// accumulators where kRows is 256.
using Registers = device::RegisterPlan<32 * kConsumerWarps, 184, 128, 136>;
static_assert(Registers::kThreads == kHeadThreads);
// Lanes that share a row of a finished tile, and how many rows a lane has at a time: with eight
// rows a warp has enough to do while it waits for tanh, exp and its neighbours' sums.
constexpr int kRowLanes = 8, kRowGroups = 2;
constexpr int32_t kRowsAtOnce = kRowGroups * 32 / kRowLanes;

template <int kRows>
struct Finished {
  HeadTile<kRows> tile;
  sm90::Pipeline<1> pipeline;  // its producers are the warps that multiply
};

template <int kRows>
using Shared = Ring<kRows, Finished<kRows>>;

DGEMMA_DEVICE int32_t count_active(const Logits& logits) {
  if (logits.active == nullptr) return logits.batch;
  int32_t count = 0;
  for (int32_t request = 0; request < logits.batch; ++request) count += logits.active[request] != 0;
  return count;
}

DGEMMA_DEVICE int32_t nth_active(const Logits& logits, int32_t n) {
  if (logits.active == nullptr) return n;
  int32_t request = 0;
  for (;; ++request)
    if (logits.active[request] != 0 && n-- == 0) return request;
}

struct WorkTile {
  int32_t request, first_row;
  int32_t tile;  // of a cluster's second block perhaps one past the last
  bool last;     // of this block
};

// Calls visit(work_tile) for every work tile of this block.
template <int kRows, typename Visit>
DGEMMA_DEVICE void for_each_work_tile(const Head& p, const HeadPlan& plan, Visit visit) {
  const int32_t active = count_active(p.logits);
  const int64_t work_tiles = count_work_tiles(plan, active), stride = gridDim.x / kClusterBlocks;
  const int32_t rank = static_cast<int32_t>(device::cluster_block_rank());
  for (int64_t index = blockIdx.x / kClusterBlocks; index < work_tiles; index += stride) {
    const HeadWorkTile work_tile = find_work_tile(plan, active, index);
    visit(WorkTile{nth_active(p.logits, work_tile.request), work_tile.row_tile * kRows,
                   static_cast<int32_t>(kClusterBlocks) * work_tile.tile_pair + rank,
                   index + stride >= work_tiles});
  }
}

// One thread calls this.
template <int kRows>
DGEMMA_DEVICE void load(Shared<kRows>& shared, const device::TensorMap* embedding,
                        const device::TensorMap* hidden, const Head& p, const HeadPlan& plan,
                        int32_t steps) {
  const auto embedding_policy =
      plan.row_tiles * p.logits.batch == 1 ? device::evict_first() : device::evict_normal();
  const auto row_policy = device::evict_last();
  typename Shared<kRows>::State at;
  for_each_work_tile<kRows>(p, plan, [&](const WorkTile& work_tile) {
    for (int32_t step = 0; step < steps; ++step)
      fill(shared, at, hidden, step * kStageDepth, work_tile.first_row, work_tile.request,
           row_policy, [&](auto& stage, device::Mbarrier* full) {
             device::tma_load(stage.embedding, embedding, full, embedding_policy,
                              step * kStageDepth, work_tile.tile * kTile);
           });
  });
}

// A warp's 16 entries of every row: sum has them entry by row, the tile wants them row by entry.
template <int kRows>
DGEMMA_DEVICE void round_into(HeadTile<kRows>& tile, const float (&sum)[kRows / 2]) {
  const uint32_t lane = device::lane_index();
  // Tiles of 8 x 8: lane l addresses row l % 8 of the tile l / 8; tiles go entry 0, entry 8 of
  // eight rows, then of the next eight.
  bfloat16* const to =
      &tile.value[lane % 8 + lane / 16 * 8][16 * device::warp_index() + lane / 8 % 2 * 8];
#pragma unroll
  for (int j = 0; j < kRows / 8; j += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = device::pack_bfloat16(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
    device::store_tiles_transposed(to + 8 * j * HeadTile<kRows>::kStride, packed);
  }
}

// A warp's share of a finished tile, as one of `workers` warps.
template <int kRows>
DGEMMA_DEVICE void finish(const HeadTile<kRows>& tile, const Head& p, const WorkTile& work_tile,
                          int32_t worker, int32_t workers) {
  if (work_tile.tile >= p.logits.tiles) return;
  const LogitScale scale = make_scale(p.logits.softcap, p.logits.temperature[work_tile.request]);
  const int32_t rows = min(kRows, p.logits.length - work_tile.first_row);
  const int64_t first =
      static_cast<int64_t>(work_tile.request) * p.logits.length + work_tile.first_row;
  for (int32_t row = worker * kRowsAtOnce; row < rows; row += workers * kRowsAtOnce)
    finish_rows<kRowLanes, kRowGroups, kRows>(p, scale, first + row, rows - row, work_tile.tile,
                                              &tile.value[row]);
}

template <int kRows>
DGEMMA_DEVICE void multiply_tiles(Shared<kRows>& shared, const Head& p, const HeadPlan& plan,
                                  int32_t steps) {
  Finished<kRows>& finished = shared.extra;
  typename Shared<kRows>::State at;
  sm90::PipelineState<1> tile_at;
  for_each_work_tile<kRows>(p, plan, [&](const WorkTile& work_tile) {
    float sum[kRows / 2] = {};  // or the last ones would be kept while tiles are finished
    multiply<Major::k>(shared, at, steps, sum);
    device::Mbarrier* const full =
        finished.pipeline.producer_acquire(tile_at);  // the previous tile is stored
    round_into(finished.tile, sum);
    __syncwarp();
    if (device::lane_index() == 0) device::mbarrier_arrive(full);
    if (work_tile.last) {
      finished.pipeline.consumer_wait(tile_at);
      finish(finished.tile, p, work_tile,
             static_cast<int32_t>(kFinishingWarps + device::warp_index()),
             kFinishingWarps + kConsumerWarps);
    }
    tile_at.advance();
  });
}

template <int kRows>
DGEMMA_DEVICE void finish_tiles(Shared<kRows>& shared, const Head& p, const HeadPlan& plan) {
  Finished<kRows>& finished = shared.extra;
  sm90::PipelineState<1> tile_at;
  for_each_work_tile<kRows>(p, plan, [&](const WorkTile& work_tile) {
    finished.pipeline.consumer_wait(tile_at);
    finish(finished.tile, p, work_tile,
           static_cast<int32_t>(device::warp_index() - kConsumerWarps - 1),
           kFinishingWarps + (work_tile.last ? kConsumerWarps : 0));
    __syncwarp();
    finished.pipeline.consumer_release(tile_at);
    tile_at.advance();
  });
}

template <int kRows>
__global__ void __launch_bounds__(kHeadThreads, 1)
    head_kernel(const __grid_constant__ device::TensorMap embedding,
                const __grid_constant__ device::TensorMap hidden, const Head p,
                const HeadPlan plan) {
  auto& shared = device::shared_memory<Shared<kRows>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&embedding);
    device::prefetch_tensor_map(&hidden);
    initialise(shared);
    shared.extra.pipeline.initialise(kConsumerWarps, kFinishingWarps);
    device::fence_mbarrier_init();
  }
  device::cluster_sync();
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();

  const int32_t steps = ceil_divide(p.hidden_size, kStageDepth);
  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) load(shared, &embedding, &hidden, p, plan, steps);
      __syncwarp();
    } else {
      finish_tiles(shared, p, plan);
    }
  } else {
    Registers::take();
    multiply_tiles(shared, p, plan, steps);
  }
  device::cluster_sync();  // the other block arrives at this one's barriers until it ends
}

// [vocabulary, hidden_size]. What lies past either end is zero.
device::TensorLayout embedding_layout(const Head& head) {
  const uint64_t width = static_cast<uint64_t>(head.hidden_size);
  return {.type = device::ElementType::bfloat16,
          .rank = 2,
          .base = head.embedding,
          .size = {width, static_cast<uint64_t>(head.logits.vocabulary)},
          .stride = {0, width * sizeof(bfloat16)},
          .box = {kStageDepth, kTile},
          .swizzle = Swizzle::bytes_128};
}

// [batch, length, hidden_size], half a row tile at a time. Past a request's last row it is zero.
device::TensorLayout hidden_layout(const Head& head, int32_t row_tile) {
  const uint64_t width = static_cast<uint64_t>(head.hidden_size);
  const uint64_t length = static_cast<uint64_t>(head.logits.length);
  return {.type = device::ElementType::bfloat16,
          .rank = 3,
          .base = head.hidden,
          .size = {width, length, static_cast<uint64_t>(head.logits.batch)},
          .stride = {0, width * sizeof(bfloat16), width * sizeof(bfloat16) * length},
          .box = {kStageDepth, static_cast<uint32_t>(row_tile) / kClusterBlocks, 1},
          .swizzle = Swizzle::bytes_128};
}

template <int kRows>
const char* launch(const HeadPlan& plan, const Head& head, void* stream) {
  static_assert(sizeof(Shared<kRows>) <= kSharedLimit90);
  device::TensorMap embedding, hidden;
  if (const char* error = device::encode_tensor_map(&embedding, embedding_layout(head)))
    return error;
  if (const char* error = device::encode_tensor_map(&hidden, hidden_layout(head, kRows)))
    return error;
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.blocks)),
                                     .threads = kHeadThreads,
                                     .shared_bytes = sizeof(Shared<kRows>),
                                     .cluster_blocks = kClusterBlocks,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, head_kernel<kRows>, embedding, hidden, head, plan);
}

}  // namespace

const char* launch_head_sm90_bf16(const HeadPlan& plan, const Head& head, void* stream) {
  if (plan.row_tile == 64) return launch<64>(plan, head, stream);
  if (plan.row_tile == 128) return launch<128>(plan, head, stream);
  return launch<256>(plan, head, stream);
}

}  // namespace dgemma
